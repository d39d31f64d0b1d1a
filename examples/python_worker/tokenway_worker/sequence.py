"""One running sequence: its credit, its end, and the checks of its tokens. It must not know
runners.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from . import wire
from .failures import Failure
from .outgoing import Outgoing
from .rules import Rules
from .runner import Ended, Token

log = logging.getLogger("tokenway_worker")


class Sequence:
    """A sequence that the engine has submitted. It ends once: with its last token, a failure or a
    cancel.

    `on_over` is called for the first two, and `on_lost` if the device fails. The stream's lock
    guards it, so nothing is sent after its end.
    """

    def __init__(
        self,
        submit: wire.Submit,
        vocabulary_size: int,
        outgoing: Outgoing,
        on_over: Callable[[Sequence], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.number = submit.sequence
        self.request = submit.request
        self.on_lost = on_lost
        self._rules = Rules(submit.request, vocabulary_size)
        self._outgoing = outgoing
        self._on_over = on_over
        self._changed = threading.Condition(outgoing.lock)
        self._credit = submit.credit
        self._next_index = len(submit.request.delivered)
        self._next_of_prompt = 0
        self._is_over = False
        self._computes_since_s: float | None = None

    # Called by the stream.

    def grant(self, tokens: int) -> None:
        """Adds credit for this many tokens."""
        with self._changed:
            self._credit += tokens
            self._changed.notify()

    def cancel(self) -> None:
        """Ends the sequence without sending anything."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    # Called by the slot's thread.

    def accept(self) -> bool:
        """Sends `accepted`. Returns false if the sequence was cancelled."""
        with self._changed:
            if not self._is_over:
                self._outgoing.say(wire.accepted(self.number))
                self._computes()
            return not self._is_over

    def refuse(self, failure: Failure) -> None:
        """Sends `refused`."""
        with self._changed:
            if not self._is_over:
                self._outgoing.say(wire.refused(self.number, failure))
                self._finish()

    def emit(self, token: Token) -> None:
        """Sends a token and waits for credit for the next. Raises `Ended` if there is no next."""
        with self._changed:
            self._await_credit()
            self._check(self._rules.broken_by(token, self._next_of_prompt))
            self._send(token)
            if self._has_all(token):
                self._end(wire.End.LENGTH)
                raise Ended
            self._await_credit()

    def stop(self, token: Token) -> None:
        """Sends the token that ends the sequence."""
        with self._changed:
            if self._is_last_of_max_tokens(token):
                self.emit(token)
            self._await_credit()
            self._check(self._rules.broken_by(token, self._next_of_prompt))
            self._check(self._rules.broken_by_end(token, self._next_index + 1))
            self._send(token)
            self._end(wire.End.STOP)

    def fail(self, failure: Failure) -> None:
        """Ends the sequence with a failure, unless it has ended."""
        with self._changed:
            if not self._is_over:
                self._end(wire.End.FAILED, failure)

    def fault(self, rule: str) -> None:
        """Ends the sequence because its runner violated the protocol, unless it has ended."""
        with self._changed:
            if not self._is_over:
                at = self._next_index
                message = "sequence %d of request %s fails at token %d: the runner %s"
                log.error(message, self.number, self.request.request_id, at, rule)
                self._end(wire.End.FAILED, Failure(False, f"the runner {rule}"))

    def __call__(self) -> bool:
        """True if the sequence has ended. The call also shows that the last device call has
        returned."""
        self._computes()
        return self._is_over

    def wait(self, seconds: float) -> bool:
        """Sleeps until the sequence ends, at most this long. Returns true if it has ended."""
        with self._changed:
            self._computes_since_s = None
            self._changed.wait_for(lambda: self._is_over, seconds)
            self._computes()
            return self._is_over

    def computes_since_s(self) -> float | None:
        """Monotonic start time of the running device call, or None."""
        return self._computes_since_s

    def _computes(self) -> None:
        self._computes_since_s = time.monotonic()

    def _await_credit(self) -> None:
        if self._credit == 0 and not self._is_over:
            self._computes_since_s = None
            self._changed.wait_for(lambda: self._credit > 0 or self._is_over)
        self._computes()
        if self._is_over:
            raise Ended

    def _check(self, broken: str | None) -> None:
        if broken:
            self.fault(broken)
            raise Ended

    def _send(self, token: Token) -> None:
        self._credit -= 1
        index = self._next_of_prompt if token.is_prompt else self._next_index
        if token.is_prompt:
            self._next_of_prompt += 1
        else:
            self._next_index += 1
        emitted_ns = time.monotonic_ns() if self.request.stamps else 0
        self._outgoing.token(self.number, index, token, emitted_ns)

    def _has_all(self, token: Token) -> bool:
        """True if this was the last requested token."""
        if token.is_prompt and self._next_of_prompt < len(self.request.prompt):
            return False
        return self._next_index >= self.request.max_tokens

    def _is_last_of_max_tokens(self, token: Token) -> bool:
        """True if only `max_tokens` ends the sequence with this token.

        Eos and stop tokens are hidden from the text. A runner may return its last token instead of
        emitting it, and then the token must not be hidden.
        """
        is_stop = token.is_prompt or not token.data or token.id in self.request.stop_token_ids
        return not is_stop and self._next_index + 1 == self.request.max_tokens

    def _end(self, end: wire.End, failure: Failure | None = None) -> None:
        self._outgoing.end(self.number, self._next_index, end, failure)
        self._finish()

    def _finish(self) -> None:
        self._is_over = True
        self._on_over(self)
