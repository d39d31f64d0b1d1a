"""One stream to an engine, from `hello` to its end: who runs on it, and what is said when.

It must not know how the engine is reached, nor what makes the tokens.
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

# How long the engine may take to welcome a worker, and to end a stream that the worker has ended.
WELCOME_S = 10.0
FAREWELL_S = 5.0
# What may wait to be said, besides a few messages for each slot.
CAPACITY = 1024


class Call(Protocol):
    """What the engine says, as it comes."""

    def __iter__(self) -> Iterator[Any]: ...
    def cancel(self) -> bool: ...


class Session:
    """The worker on one stream. The lock of what goes out guards all of it."""

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
        self._life = 0
        self._timer: threading.Timer | None = None
        # What the stream has shown, for the worker to go by when it has ended.
        self.is_welcome = False
        self.is_draining = False
        self.load_error: str | None = None

    def run(self, attach: Callable[[Iterator[Message]], Call]) -> None:
        """Serves until the stream ends. Raises what ends it, if that is not a farewell."""
        try:
            with self._lock:
                if self._outgoing.is_closed:
                    return
                self._call = attach(self._outgoing)
                self._end_in(WELCOME_S)
            for response in self._call:
                self._hear(wire.heard(response))
        finally:
            self._leave()

    def finish(self) -> None:
        """Ends the stream once what has been made is sent. What still runs is the engine's to
        place."""
        with self._lock:
            self._outgoing.close()
            self._end_in(FAREWELL_S)

    def _hear(self, said: wire.Heard | None) -> None:
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
                log.info("the engine lets this worker end")
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
        # Not here: a model may load for minutes, and whoever cancels must be heard meanwhile.
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
            self._life += 1
            runner = self._device.runner
            self._outgoing.say(wire.ready(runner.model, runner.slots, self._life))

    def _submit(self, submit: wire.Submit) -> None:
        with self._lock:
            if submit.life != self._life or not self._is_ready:
                # It crossed the word that the device failed: the engine counts it as lost.
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
            return Failure(False, "the worker takes no sequences now")
        if submit.sequence in self._live or len(self._live) >= self._device.runner.slots:
            return Failure(False, "the worker has no slot for the sequence")
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
                # Also of one that has ended, and whose end is still here.
                self._outgoing.forget(number)
            self._end_if_drained()
        for sequence in cancelled:
            self._device.withdraw(sequence)

    def _over(self, sequence: Sequence) -> None:
        """A sequence has told its end."""
        self._live.pop(sequence.number, None)
        self._end_if_drained()

    def _lost(self, reason: str) -> None:
        """The device failed. Only the first to find out is heard."""
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
        log.error("the engine does not read what this worker says; the stream is given up")
        if self._call:
            self._call.cancel()

    def _end_in(self, seconds: float) -> None:
        """Ends the stream then, if nobody has by that time."""
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
    """What is wrong with a request for this model: the engine checks as much, and a device that is
    given more than it can hold may not survive it."""
    model = device.runner.model
    ids = (*request.prompt, *request.delivered)
    if not request.prompt:
        return "The prompt has no token."
    if max(ids) >= model.vocabulary_size:
        return "A token is not one of the vocabulary's."
    if len(request.prompt) + request.max_tokens > model.context_length:
        return "The prompt and max_tokens together are longer than the context."
    if len(request.delivered) >= request.max_tokens and not request.scores_prompt:
        return "All tokens have been delivered."
    return None
