"""Checks of tokens against the protocol. The engine would drop the whole worker for an invalid
token, so the worker fails the sequence instead.

This module must not know streams or credit. Its messages never contain a client's text.
"""

from __future__ import annotations

from dataclasses import dataclass

from .runner import Logprobs, Request, Token

# Maximum length of a token's data and of its `token_bytes`.
MAX_TOKEN_BYTES = 1024
# Maximum number of top logprobs per token.
MAX_TOP_LOGPROBS = 20
# Largest 32-bit float. A larger value would become infinite in a message.
MAX_LOGPROB = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Rules:
    """Checks for the tokens of one sequence."""

    request: Request
    vocabulary_size: int

    def broken_by(self, token: Token, of_prompt: int) -> str | None:
        """The rule that this token breaks, if any. `of_prompt` prompt tokens were emitted
        before."""
        if not self._is_id(token.id):
            return f"emitted an id outside the vocabulary of {self.vocabulary_size} tokens"
        if not _is_short(token.data):
            return f"emitted a token whose data is not bytes of at most {MAX_TOKEN_BYTES}"
        if not (_is_whole(token.due_ns) and 0 <= token.due_ns < 2**64):
            return "emitted a token whose due_ns is not a 64-bit time"
        scored = len(self.request.prompt) if self.request.scores_prompt else 0
        if token.is_prompt and of_prompt >= scored:
            return "emitted a prompt token that was not requested"
        if not token.is_prompt and of_prompt < scored:
            return "emitted a token before the requested tokens of the prompt"
        if token.logprobs is not None:
            broken = self._broken_logprobs(token.logprobs)
            if broken:
                return broken
        needs_logprob = self.request.logprobs is not None or token.is_prompt
        # The first token of a prompt has no logprob.
        is_first = token.is_prompt and of_prompt == 0
        has_logprob = token.logprobs and (token.logprobs.logprob is not None or is_first)
        if needs_logprob and not has_logprob:
            return "emitted a token without the requested logprob"
        return None

    def broken_by_end(self, token: Token, count: int) -> str | None:
        """The rule that is broken if this token, the `count`th, ends the sequence."""
        if token.is_prompt:
            return "ended the sequence with a prompt token"
        if count < self.request.min_tokens:
            return "ended the sequence before it had min_tokens"
        if self.request.ignore_eos and token.id not in self.request.stop_token_ids:
            return "ended the sequence without a stop token although ignore_eos is set"
        return None

    def _broken_logprobs(self, it: Logprobs) -> str | None:
        if len(it.top) > MAX_TOP_LOGPROBS:
            return f"emitted a token with more than {MAX_TOP_LOGPROBS} top logprobs"
        if not all(self._is_id(top.id) for top in it.top):
            return "reported a top logprob of an id outside the vocabulary"
        if not all(map(_is_short, [it.token_bytes, *(top.token_bytes for top in it.top)])):
            return f"emitted a token whose token_bytes is not bytes of at most {MAX_TOKEN_BYTES}"
        logprobs = [top.logprob for top in it.top]
        if it.logprob is not None:
            logprobs.append(it.logprob)
        # Minus infinity is allowed and sent as -9999. Comparisons with NaN are false.
        if not all(logprob <= MAX_LOGPROB for logprob in logprobs):
            return "emitted a token with a logprob that is not a finite number"
        return None

    def _is_id(self, id: int) -> bool:
        return _is_whole(id) and 0 <= id < self.vocabulary_size


# Types are checked here because a wrong type would fail only on the sending thread, which serves
# all sequences.


def _is_whole(number: int) -> bool:
    # Not `isinstance`, so that elements of arrays are accepted as well.
    return hasattr(number, "__index__")


def _is_short(data: bytes) -> bool:
    return isinstance(data, bytes) and len(data) <= MAX_TOKEN_BYTES
