"""One stream to an engine, from `hello` to its end: its sequences and its messages.

It must not know how to connect to the engine, nor runners.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from google.protobuf.message import Message

from . import wire
from .answers import Answers
from .device import Device
from .failures import Failure
from .outgoing import Outgoing
from .runner import LoadError, Request
from .sequence import Sequence

log = logging.getLogger("tokenway_worker")

# Timeouts for the engine's `welcome` and for the end of a stream that the worker has ended.
WELCOME_S = 10.0
FAREWELL_S = 5.0
# Capacity of the send queue, besides a few messages per slot.
CAPACITY = 1024


class Call(Protocol):
    """Responses of the engine."""

    def __iter__(self) -> Iterator[Any]: ...
    def cancel(self) -> bool: ...


class Session:
    """The worker's state on one stream, guarded by the lock of its send buffer."""

    def __init__(self, device: Device, answers: Answers, hello: Message) -> None:
        self._device = device
        self._answers = answers
        capacity = CAPACITY + 4 * device.runner.slots
        self._outgoing = Outgoing(capacity, device.step_ms, self._not_read)
        self._lock = self._outgoing.lock
        self._outgoing.say(hello)
        self._call: Call | None = None
        self._live: dict[int, Sequence] = {}
        self._is_ready = False
        self._generation = 0
        self._timer: threading.Timer | None = None
        # Read by the worker after the stream has ended.
        self.is_welcome = False
        self.is_draining = False
        self.load_error: str | None = None

    def run(self, attach: Callable[[Iterator[Message]], Call]) -> None:
        """Serves until the stream ends. Raises the RPC error, if any."""
        try:
            with self._lock:
                if self._outgoing.is_closed:
                    return
                self._call = attach(self._outgoing)
                self._end_in(WELCOME_S)
            for response in self._call:
                self._handle_message(wire.parse(response))
        finally:
            self._leave()

    def finish(self) -> None:
        """Ends the stream after everything queued is sent. The engine resumes running sequences on
        other workers."""
        with self._lock:
            self._outgoing.close()
            self._end_in(FAREWELL_S)

    def _handle_message(self, said: wire.EngineMessage | None) -> None:
        match said:
            case wire.Welcome(interval_s):
                self._welcome(interval_s)
            case wire.Submit():
                self._submit(said)
            case wire.Credit(grants):
                self._credit(grants)
            case wire.Cancel(sequences):
                self._cancel(sequences)
            case wire.Question():
                self._answers.ask(said, self._outgoing, self._lost)
            case wire.Drain():
                log.info("the engine drains this worker")
                with self._lock:
                    self.is_draining = True
                    self._end_if_drained()
            case None:
                pass

    def _welcome(self, interval_s: float) -> None:
        with self._lock:
            self.is_welcome = True
            if self._timer and not self._outgoing.is_closed:
                self._timer.cancel()
            self._outgoing.begin_heartbeats(interval_s)
        self._prepare()

    def _prepare(self) -> None:
        # On a separate thread: loading may take minutes, and messages must be handled meanwhile.
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def _load(self) -> None:
        try:
            self._device.prepare(lambda fraction: self._outgoing.say(wire.loading(fraction)))
        except LoadError as error:
            with self._lock:
                self.load_error = str(error)
                self._outgoing.say(wire.load_failed(str(error)))
                self.finish()
            return
        with self._lock:
            self._is_ready = True
            self._generation += 1
            runner = self._device.runner
            self._outgoing.say(wire.ready(runner.model, runner.slots, self._generation))

    def _submit(self, submit: wire.Submit) -> None:
        with self._lock:
            if submit.generation != self._generation or not self._is_ready:
                # Submitted before the engine knew that the device failed. It counts as lost there.
                return
            failure = self._reason_to_refuse(submit)
            if failure:
                self._outgoing.say(wire.refused(submit.sequence, failure))
                return
            size = self._device.runner.model.vocabulary_size
            sequence = Sequence(submit, size, self._outgoing, self._over, self._lost)
            self._live[submit.sequence] = sequence
        self._device.submit(sequence)

    def _reason_to_refuse(self, submit: wire.Submit) -> Failure | None:
        if self.is_draining:
            return Failure(False, "the worker is draining")
        if submit.sequence in self._live or len(self._live) >= self._device.runner.slots:
            return Failure(False, "the worker has no free slot")
        message = _fault(submit.request, self._device)
        return Failure(True, message) if message else None

    def _credit(self, grants: tuple[tuple[int, int], ...]) -> None:
        with self._lock:
            for number, tokens in grants:
                if number in self._live:
                    self._live[number].grant(tokens)

    def _cancel(self, numbers: tuple[int, ...]) -> None:
        with self._lock:
            cancelled = [it for number in numbers if (it := self._live.pop(number, None))]
            for sequence in cancelled:
                sequence.cancel()
            for number in numbers:
                # Also drops the unsent end of a sequence that has ended.
                self._outgoing.forget(number)
            self._end_if_drained()
        for sequence in cancelled:
            self._device.withdraw(sequence)

    def _over(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended."""
        self._live.pop(sequence.number, None)
        self._end_if_drained()

    def _lost(self, reason: str) -> None:
        """Reports that the device failed. Only the first report counts."""
        with self._lock:
            if not self._is_ready:
                return
            self._is_ready = False
            log.error("the device failed: %s", reason)
            self._cancel(tuple(self._live))
            self._outgoing.say(wire.crashed(reason))
        if not self.is_draining:
            self._prepare()

    def _end_if_drained(self) -> None:
        if self.is_draining and not self._live:
            self.finish()

    def _not_read(self) -> None:
        log.error("the engine does not read this worker's messages; closing the stream")
        if self._call:
            self._call.cancel()

    def _end_in(self, seconds: float) -> None:
        """Cancels the stream after this time, unless it has ended."""
        if self._timer:
            self._timer.cancel()
        if self._call:
            self._timer = threading.Timer(seconds, self._call.cancel)
            self._timer.daemon = True
            self._timer.start()

    def _leave(self) -> None:
        with self._lock:
            self._is_ready = False
            self._outgoing.break_off()
            self._cancel(tuple(self._live))
            if self._timer:
                self._timer.cancel()


def _fault(request: Request, device: Device) -> str | None:
    """Checks a request against the model's limits. The engine checks them too, but an invalid
    request could crash the device."""
    model = device.runner.model
    ids = (*request.prompt, *request.delivered)
    if not request.prompt:
        return "The prompt is empty."
    if max(ids) >= model.vocabulary_size:
        return "A token id is not in the vocabulary."
    if len(request.prompt) + request.max_tokens > model.context_length:
        return "The prompt and max_tokens exceed the context length."
    if len(request.delivered) >= request.max_tokens and not request.scores_prompt:
        return "The resumed request already has max_tokens tokens."
    return None
