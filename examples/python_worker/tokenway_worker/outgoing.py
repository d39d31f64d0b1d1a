"""The send buffer of one stream: order and size of the messages.

gRPC takes one message after the other on its own thread. Heartbeats are created when a message is
taken, so nothing that a runner does can delay them. This module must not know runners.
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

# Maximum number of tokens per message. They fit even if each has the logprobs of twenty others.
STEP_TOKENS = 2048


@dataclass(slots=True)
class _Emitted:
    """A token that waits to be sent."""

    index: int
    token: Token
    emitted_ns: int


@dataclass(slots=True)
class _Pending:
    """Unsent tokens and the end of one sequence. The sequence's credit bounds it."""

    next_index: int = 0
    tokens: deque[_Emitted] = field(default_factory=deque)
    end: wire.End = wire.End.GOES_ON
    failure: Failure | None = None


class Outgoing(Iterator[Message]):
    """Iterator over the messages of one stream, consumed by gRPC.

    `capacity` is the maximum number of queued messages besides tokens. If the engine does not read
    and the queue fills up, `on_full` is called and the stream is broken off. `step_ms` returns the
    duration of the running device call.
    """

    def __init__(
        self, capacity: int, step_ms: Callable[[], int], on_full: Callable[[], None]
    ) -> None:
        # Guards all state of the stream and of its sequences.
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
        """True if no more messages can be queued."""
        return self._is_closed

    def say(self, message: Message) -> None:
        """Queues a message. Messages are sent in order, and before waiting tokens."""
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
        """Queues a token for the next step. An `emitted_ns` of 0 means no timestamp."""
        with self.lock:
            pending = self._of(sequence)
            if pending:
                pending.tokens.append(_Emitted(index, token, emitted_ns))

    def end(
        self, sequence: int, next_index: int, end: wire.End, failure: Failure | None = None
    ) -> None:
        """Queues the end of a sequence, in the same step as its last token if that is unsent."""
        with self.lock:
            pending = self._of(sequence)
            if pending:
                pending.next_index, pending.end, pending.failure = next_index, end, failure

    def forget(self, sequence: int) -> None:
        """Drops the unsent tokens and the end of a sequence."""
        with self.lock:
            self._pending.pop(sequence, None)

    def begin_heartbeats(self, interval_s: float) -> None:
        """Sends a heartbeat at once and then at this interval."""
        with self.lock:
            self._heartbeat_interval_s = interval_s
            self._changed.notify()

    def close(self) -> None:
        """Ends the stream after everything queued has been sent."""
        with self.lock:
            self._is_closed = True
            self._changed.notify()

    def break_off(self) -> None:
        """Ends the stream now and drops everything queued."""
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
                timeout_s = self._until_heartbeat()
                if timeout_s is not None and timeout_s <= 0:
                    return self._heartbeat()
                if self._said:
                    return self._said.popleft()
                if self._pending:
                    return self._step()
                if self._is_closed:
                    raise StopIteration
                self._changed.wait(timeout_s)

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
        """Builds a step from all waiting tokens, up to `STEP_TOKENS`."""
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
                # Moved to the end, so that a long sequence does not delay others.
                self._pending[sequence] = pending
        return wire.step(steps)


def _take(sequence: int, pending: _Pending, room: int) -> wire.SequenceStep:
    """Takes up to `room` tokens, of the prompt or of the completion, and the end after the last."""
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
