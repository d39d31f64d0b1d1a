"""Repeats the prompt, one byte per token, at a fixed interval: a runner without a model, for trying
out an engine.

Tokens are bytes. Each depends only on the prompt and the position, so a resumed sequence continues
exactly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .runner import (
    Cancelled,
    ChatMessage,
    Emit,
    Invalid,
    ModelFacts,
    Options,
    Request,
    Resumption,
    Runner,
    Token,
)

# Id of the eos token, after the ids of all bytes.
END_OF_SEQUENCE = 256


class EchoRunner(Runner):
    """Repeats the prompt once, or for as long as `min_tokens` or `ignore_eos` ask."""

    def __init__(self, options: Options) -> None:
        self.slots = options.slots
        self._interval_ns = int(options.interval_s * 1e9)
        self.model = ModelFacts(
            runner="echo",
            context_length=options.context_length,
            vocabulary_size=END_OF_SEQUENCE + 1,
            max_prompt_bytes=options.context_length,
            resumption=Resumption.EXACT,
            # Tokens do not depend on sampling, so requests with sampling parameters are rejected.
            honours=("min_tokens", "ignore_eos", "stop_token_ids"),
        )

    def check(self, request: Request) -> None:
        if END_OF_SEQUENCE in request.prompt:
            raise Invalid("The prompt must not contain the end-of-sequence token.")

    def generate(self, request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        prompt = request.prompt
        due_ns = time.monotonic_ns()
        for index in range(len(request.delivered), request.max_tokens):
            # Due times are absolute, so a delayed sequence catches up.
            due_ns += self._interval_ns
            cancelled.wait((due_ns - time.monotonic_ns()) / 1e9)
            is_early = index < request.min_tokens
            if index >= len(prompt) and not is_early and not request.ignore_eos:
                return Token(END_OF_SEQUENCE, b"", due_ns)
            id = prompt[index % len(prompt)]
            token = Token(id, bytes([id]), due_ns)
            if request.is_end(id, is_eos=False) and not is_early:
                return token
            emit(token)
        return None

    def tokenize(self, text: str, begins: bool) -> Sequence[int]:
        return text.encode()

    def detokenize(self, ids: Sequence[int]) -> Sequence[bytes]:
        return [bytes([id]) if id < END_OF_SEQUENCE else b"" for id in ids]

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        return "".join(f"{message.role}: {message.content}\n" for message in messages)
