"""What the worker has to say on one stream: in which order, and how much at once.

gRPC takes one message after the other, on a thread of its own. So heartbeats are made where
messages are taken, and nothing that a runner does can keep one back. It must not know runners.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile

from google.protobuf.message import Message

from . import wire
from .failures import Failure
from .runner import Token

# The most tokens in one message: each with the log probabilities of twenty others, they fit.
STEP_TOKENS = 2048


@dataclass(slots=True)
class _Emitted:
    """A token that waits to be taken."""

    index: int
    token: Token
    emitted_ns: int


@dataclass(slots=True)
class _Pending:
    """What waits to be taken of one sequence. Its credit bounds it."""

    next_index: int = 0
    tokens: deque[_Emitted] = field(default_factory=deque)
    end: wire.End = wire.End.GOES_ON
    failure: Failure | None = None


class Outgoing(Iterator[Message]):
    """The requests of one stream, as gRPC takes them.

    `capacity` bounds what is said besides tokens; an engine that lets so much lie is given up by
    `on_full`. `step_ms` says how long the device has computed.
    """

    def __init__(
        self, capacity: int, step_ms: Callable[[], int], on_full: Callable[[], None]
    ) -> None:
        # It guards everything of the stream: what is said, and what each sequence may say.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._capacity = capacity
        self._step_ms = step_ms
        self._on_full = on_full
        self._said: deque[Message] = deque()
        self._pending: dict[int, _Pending] = {}
        self._heartbeat_interval_s: float | None = None
        self._heartbeat_due_s = 0.0
        self._is_closed = False
        self._is_broken = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more can be said."""
        return self._is_closed

    def say(self, message: Message) -> None:
        """Says this after what was said before, and before the tokens that wait."""
        with self.lock:
            if self._is_closed:
                return
            if self._said and wire.is_loading(self._said[-1]) and wire.is_loading(message):
                self._said.pop()
            if len(self._said) >= self._capacity:
                self._on_full()
                self.break_off()
                return
            self._said.append(message)
            self._changed.notify()

    def token(self, sequence: int, index: int, token: Token, emitted_ns: int) -> None:
        """Sends a token with the next step; `emitted_ns` 0 is no time."""
        with self.lock:
            pending = self._of(sequence)
            if pending:
                pending.tokens.append(_Emitted(index, token, emitted_ns))

    def end(
        self, sequence: int, next_index: int, end: wire.End, failure: Failure | None = None
    ) -> None:
        """Ends a sequence, in the same step as its last token where that is still here."""
        with self.lock:
            pending = self._of(sequence)
            if pending:
                pending.next_index, pending.end, pending.failure = next_index, end, failure

    def forget(self, sequence: int) -> None:
        """Drops what waits of a sequence."""
        with self.lock:
            self._pending.pop(sequence, None)

    def begin_heartbeats(self, interval_s: float) -> None:
        """Sends a heartbeat at once, and then so often."""
        with self.lock:
            self._heartbeat_interval_s = interval_s
            self._changed.notify()

    def close(self) -> None:
        """Ends the stream when all that waits has been sent."""
        with self.lock:
            self._is_closed = True
            self._changed.notify()

    def break_off(self) -> None:
        """Ends the stream now. Nothing is said any more."""
        with self.lock:
            self._is_closed = self._is_broken = True
            self._said.clear()
            self._pending.clear()
            self._changed.notify()

    def __next__(self) -> Message:
        with self.lock:
            while True:
                if self._is_broken:
                    raise StopIteration
                patience_s = self._until_heartbeat()
                if patience_s is not None and patience_s <= 0:
                    return self._heartbeat()
                if self._said:
                    return self._said.popleft()
                if self._pending:
                    return self._step()
                if self._is_closed:
                    raise StopIteration
                self._changed.wait(patience_s)

    def _of(self, sequence: int) -> _Pending | None:
        if self._is_closed:
            return None
        self._changed.notify()
        return self._pending.setdefault(sequence, _Pending())

    def _until_heartbeat(self) -> float | None:
        if self._heartbeat_interval_s is None:
            return None
        return self._heartbeat_due_s - time.monotonic()

    def _heartbeat(self) -> Message:
        self._heartbeat_due_s = time.monotonic() + (self._heartbeat_interval_s or 0.0)
        return wire.heartbeat(self._step_ms())

    def _step(self) -> Message:
        """All that is ready, as far as one message may hold it."""
        room = STEP_TOKENS
        steps: list[wire.SequenceStep] = []
        for sequence in list(self._pending):
            if room == 0:
                break
            pending = self._pending.pop(sequence)
            step = _take(sequence, pending, room)
            steps.append(step)
            room -= len(step.tokens)
            if pending.tokens:
                # Behind the others, so that one that has much to say keeps nobody waiting.
                self._pending[sequence] = pending
        return wire.step(steps)


def _take(sequence: int, pending: _Pending, room: int) -> wire.SequenceStep:
    """Up to so many tokens, either of the prompt or of the completion, with the end behind the
    last."""
    tokens = pending.tokens
    first_index = tokens[0].index if tokens else pending.next_index
    is_prompt = bool(tokens) and tokens[0].token.is_prompt
    alike = takewhile(lambda it: it.token.is_prompt == is_prompt, islice(tokens, room))
    taken = [tokens.popleft() for _ in list(alike)]
    is_all = not tokens
    return wire.SequenceStep(
        sequence=sequence,
        first_index=first_index,
        tokens=[it.token for it in taken],
        emitted_ns=[it.emitted_ns for it in taken] if all(it.emitted_ns for it in taken) else [],
        is_prompt=is_prompt,
        end=pending.end if is_all else wire.End.GOES_ON,
        failure=pending.failure if is_all else None,
    )
