"""What the contract asks of a token. An engine that is sent another gives up the whole worker, so
the one sequence is to end before that.

It must not know streams or credit. Nothing that it says holds what a client wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from .runner import Logprobs, Request, Token

# The longest token, and the longest token_bytes of one.
MAX_TOKEN_BYTES = 1024
# The most of the likeliest tokens beside one.
MAX_TOP_LOGPROBS = 20
# The largest number of 32 bits: in a message, what is above it is infinite.
MAX_LOGPROB = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of one sequence's tokens, on a model with so many."""

    request: Request
    vocabulary_size: int

    def broken_by(self, token: Token, of_prompt: int) -> str | None:
        """What a runner did wrong that emits this token behind so many of the prompt's."""
        if not self._is_id(token.id):
            return f"emitted an id that is none of the vocabulary's {self.vocabulary_size}"
        if not _is_short(token.data):
            return f"emitted a token whose data are not up to {MAX_TOKEN_BYTES} bytes"
        if not (_is_whole(token.due_ns) and 0 <= token.due_ns < 2**64):
            return "emitted a token whose due_ns is no time"
        scored = len(self.request.prompt) if self.request.scores_prompt else 0
        if token.is_prompt and of_prompt >= scored:
            return "emitted a token of the prompt that nobody asked for"
        if not token.is_prompt and of_prompt < scored:
            return "emitted a token before those of the prompt, which were asked for"
        if token.logprobs is not None:
            broken = self._broken_logprobs(token.logprobs)
            if broken:
                return broken
        is_asked = self.request.logprobs is not None or token.is_prompt
        # Nothing comes before the first token of a prompt.
        is_first = token.is_prompt and of_prompt == 0
        is_told = token.logprobs and (token.logprobs.logprob is not None or is_first)
        if is_asked and not is_told:
            return "emitted a token without its log probability, which was asked for"
        return None

    def broken_by_end(self, token: Token, count: int) -> str | None:
        """What a runner did wrong that ends the sequence with this token, its last of so many."""
        if token.is_prompt:
            return "ended the sequence with a token of the prompt"
        if count < self.request.min_tokens:
            return "ended the sequence before it had min_tokens"
        if self.request.ignore_eos and token.id not in self.request.stop_token_ids:
            return "ended the sequence with no stop token, though ignore_eos was asked for"
        return None

    def _broken_logprobs(self, it: Logprobs) -> str | None:
        if len(it.top) > MAX_TOP_LOGPROBS:
            return f"emitted a token with more than {MAX_TOP_LOGPROBS} of the likeliest beside it"
        if not all(self._is_id(top.id) for top in it.top):
            return "told of a likely token that is none of the vocabulary's"
        if not all(map(_is_short, [it.token_bytes, *(top.token_bytes for top in it.top)])):
            return f"emitted a token whose token_bytes is not up to {MAX_TOKEN_BYTES} bytes"
        told = [top.logprob for top in it.top]
        if it.logprob is not None:
            told.append(it.logprob)
        # Minus infinity is sent as the least that the contract knows. No comparison holds for NaN.
        if not all(logprob <= MAX_LOGPROB for logprob in told):
            return "emitted a token with a log probability that is no finite number"
        return None

    def _is_id(self, id: int) -> bool:
        return _is_whole(id) and 0 <= id < self.vocabulary_size


# What is not of its type cannot be sent. That would show only on the thread that sends, which
# serves all sequences.


def _is_whole(number: int) -> bool:
    # Not `isinstance`: an array's elements are numbers, too.
    return hasattr(number, "__index__")


def _is_short(data: bytes) -> bool:
    return isinstance(data, bytes) and len(data) <= MAX_TOKEN_BYTES
