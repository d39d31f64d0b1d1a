"""Answers what only a tokenizer or a chat template knows, on threads of its own, so that neither
the device nor the stream waits for it.
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

# More than one, so that a long text keeps no short one waiting.
THREADS = 2
# How many questions may wait. The engine asks about each request once or twice, so more than this
# is a burst that would not be answered in time.
CAPACITY = 256


OnLost = Callable[[str], None]


class Answers:
    """Takes questions and says their answers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._questions: queue.Queue[tuple[wire.Question, Outgoing, OnLost]]
        self._questions = queue.Queue(CAPACITY)
        for number in range(THREADS):
            name = f"answers-{number}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def ask(self, question: wire.Question, outgoing: Outgoing, on_lost: OnLost) -> None:
        """Answers a question when its turn comes, on the stream where it was asked. `on_lost`
        is told that the device failed, where the question has shown it."""
        try:
            self._questions.put_nowait((question, outgoing, on_lost))
        except queue.Full:
            failure = Failure(False, f"{CAPACITY} questions are waiting already")
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
        # All: a thread that ended here would leave later questions without an answer.
        except BaseException as error:
            return wire.answer_failure(question.number, failure_of(error))
        if answer.ByteSize() > wire.MAX_MESSAGE_BYTES:
            failure = Failure(True, "The text has more tokens than one answer can hold.")
            return wire.answer_failure(question.number, failure)
        return answer

    def _answer_to(self, question: wire.Question) -> Message:
        number, runner = question.number, self._device.runner
        if not self._device.is_loaded:
            # On a stream that is ready this is news: another stream's question has found it out.
            raise DeviceLost("the model is not loaded")
        match question.about:
            case wire.Tokenize(text, begins):
                return wire.answer_ids(number, runner.tokenize(text, begins))
            case wire.Detokenize(ids):
                if any(id >= runner.model.vocabulary_size for id in ids):
                    unknown = Failure(True, "An id is not one of the vocabulary's.")
                    return wire.answer_failure(number, unknown)
                return wire.answer_pieces(number, runner.detokenize(ids))
            case wire.RenderChat(messages):
                return wire.answer_text(number, runner.render_chat(messages))
            case wire.Infill(prefix, suffix):
                return wire.answer_ids(number, runner.infill(prefix, suffix))
            case None:
                return wire.answer_failure(number, Failure(False, "the question is not known here"))
