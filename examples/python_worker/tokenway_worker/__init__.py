"""A device worker for Tokenway: one function serves a model.

What a runner's author needs is here. The rest of the package is the worker itself, read in this
order: `runner` (the seam), `wire` (the messages), `outgoing` (what goes out, and when), `rules`
(what a token must keep), `sequence` (one sequence in its slot), `device` (the slots' threads),
`answers` (tokenizer and template), `session` (one stream), `worker` (dialling, again and again).
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
