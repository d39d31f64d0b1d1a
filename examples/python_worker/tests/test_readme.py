"""The example runner of the README."""

from __future__ import annotations

import re
from pathlib import Path

from engine import Engine
from test_command_line import PACKAGE, process, welcome

STOPPED, LENGTH = 1, 2


def test_the_runner_of_the_readme_runs(engine: Engine, tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_module.py").write_text(code)
    args = ["--engine", engine.target, "--runner", "my_module:MyRunner"]
    with process(*args, PYTHONPATH=str(tmp_path)):
        attachment = welcome(engine)
        model = attachment.receive("ready").model
        assert model.runner == "mine"
        assert {"logprobs", "min_tokens", "temperature"} < set(model.unsupported)

        attachment.say(question={"question": 1, "tokenize": {"text": "uvw"}})
        prompt = list(attachment.receive("answer").ids.ids)
        attachment.say(submit={"sequence": 1, "prompt": prompt, "max_tokens": 9, "credit": 9})
        attachment.receive("accepted")
        tokens = attachment.receive_steps(1)
        assert (tokens.data, len(tokens.ids), tokens.end) == (b"xyz", 4, STOPPED)
        attachment.say(question={"question": 2, "detokenize": {"ids": tokens.ids}})
        assert attachment.receive("answer").pieces.bytes == b"xyz"

        asks = {"prompt": prompt, "max_tokens": 9, "credit": 9}
        attachment.say(submit={"sequence": 2, **asks, "stop_token_ids": [ord("y")]})
        attachment.receive("accepted")
        assert attachment.receive_steps(2).data == b"xy"
        attachment.say(submit={"sequence": 3, **asks, "ignore_eos": True})
        attachment.receive("accepted")
        ignored = attachment.receive_steps(3)
        assert (ignored.data, len(ignored.ids), ignored.end) == (b"xyz", 9, LENGTH)
