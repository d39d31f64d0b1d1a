"""A scorecard of gateways in front of the same faulty engine.

The modules in the order of a run: `rows` lists the faults, `play` plays a fault on a gateway from
`gateways`, in front of engines from `engine` and `story`; `client` observes, `judge` judges, and
`report` writes the table.
"""
