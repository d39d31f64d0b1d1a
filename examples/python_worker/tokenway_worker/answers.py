"""Answers tokenizer calls (text, token ids, chat templates) on separate threads, so that neither
the device nor the stream waits for them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from google.protobuf.message import Message

from . import wire
from .device import Device
from .failures import Failure, failure_of
from .outgoing import Outgoing
from .runner import DeviceLost

# More than one, so that a long text does not delay a short one.
THREADS = 2
# Maximum number of queued calls. The engine makes one or two per request, so a longer queue could
# not be answered in time.
CAPACITY = 256


OnLost = Callable[[str], None]


class Answers:
    """Queues tokenizer calls and sends their answers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._questions: queue.Queue[tuple[wire.Question, Outgoing, OnLost]]
        self._questions = queue.Queue(CAPACITY)
        for number in range(THREADS):
            name = f"answers-{number}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def ask(self, question: wire.Question, outgoing: Outgoing, on_lost: OnLost) -> None:
        """Queues a call. Its answer is sent on the stream it came from. Calls `on_lost` if the call
        shows that the device has failed."""
        try:
            self._questions.put_nowait((question, outgoing, on_lost))
        except queue.Full:
            failure = Failure(False, f"{CAPACITY} tokenizer calls are already waiting")
            outgoing.say(wire.answer_failure(question.number, failure))

    def _serve(self) -> None:
        while True:
            question, outgoing, on_lost = self._questions.get()
            outgoing.say(self._answer(question, on_lost))

    def _answer(self, question: wire.Question, on_lost: OnLost) -> Message:
        try:
            answer = self._answer_to(question)
        except DeviceLost as error:
            self._device.is_loaded = False
            on_lost(str(error))
            return wire.answer_failure(question.number, Failure(False, str(error)))
        # Catches everything: if this thread ended, later calls would get no answer.
        except BaseException as error:
            return wire.answer_failure(question.number, failure_of(error))
        if answer.ByteSize() > wire.MAX_MESSAGE_BYTES:
            failure = Failure(True, "The text has more tokens than one answer can hold.")
            return wire.answer_failure(question.number, failure)
        return answer

    def _answer_to(self, question: wire.Question) -> Message:
        number, runner = question.number, self._device.runner
        if not self._device.is_loaded:
            # A call of another stream has found the device lost; this stream does not know it yet.
            raise DeviceLost("the model is not loaded")
        match question.operation:
            case wire.Tokenize(text, begins):
                return wire.answer_ids(number, runner.tokenize(text, begins))
            case wire.Detokenize(ids):
                if any(id >= runner.model.vocabulary_size for id in ids):
                    unknown = Failure(True, "A token id is not in the vocabulary.")
                    return wire.answer_failure(number, unknown)
                return wire.answer_pieces(number, runner.detokenize(ids))
            case wire.RenderChat(messages):
                return wire.answer_text(number, runner.render_chat(messages))
            case wire.Infill(prefix, suffix):
                return wire.answer_ids(number, runner.infill(prefix, suffix))
            case None:
                return wire.answer_failure(
                    number, Failure(False, "this worker does not know this kind of call")
                )
