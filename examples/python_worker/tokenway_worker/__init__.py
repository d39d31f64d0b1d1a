"""A device worker for Tokenway: one function serves a model.

Runners need only the names exported here. The rest of the package is the worker itself, best read
in this order: `runner` (the runner interface), `wire` (the messages), `outgoing` (the send buffer),
`rules` (token checks), `sequence` (one running sequence), `device` (one thread per slot), `answers`
(tokenizer calls), `session` (one stream), `worker` (connecting and reconnecting).
"""

from .runner import (
    ALL_PARAMETERS,
    MAX_PROMPT_BYTES,
    Cancelled,
    ChatMessage,
    DeviceLost,
    Emit,
    Ended,
    Failed,
    Invalid,
    LoadError,
    Logprobs,
    ModelFacts,
    Options,
    Request,
    Resumption,
    Runner,
    Sampling,
    Token,
    TopLogprob,
)

__all__ = [
    "ALL_PARAMETERS",
    "MAX_PROMPT_BYTES",
    "Cancelled",
    "ChatMessage",
    "DeviceLost",
    "Emit",
    "Ended",
    "Failed",
    "Invalid",
    "LoadError",
    "Logprobs",
    "ModelFacts",
    "Options",
    "Request",
    "Resumption",
    "Runner",
    "Sampling",
    "Token",
    "TopLogprob",
]
