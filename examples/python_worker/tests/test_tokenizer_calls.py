"""Tokenizer calls and heartbeats, also while the device computes."""

from __future__ import annotations

from typing import Any

from conftest import Attach
from engine import Attachment
from runners import Gate, ScriptedRunner

from tokenway_worker import Cancelled, DeviceLost, Emit, Request, Token, answers, wire


def ask(attachment: Attachment, number: int, **operation: Any) -> Any:
    attachment.say(question={"question": number, **operation})
    answer = attachment.receive("answer")
    assert answer.question == number
    return answer


def test_every_kind_of_tokenizer_call_is_answered(attach: Attach) -> None:
    attachment = attach(ScriptedRunner())
    assert ask(attachment, 1, tokenize={"text": "ab"}).ids.ids == [97, 98]
    assert ask(attachment, 2, tokenize={"text": "ab", "begins": True}).ids.ids == [1, 97, 98]
    pieces = ask(attachment, 3, detokenize={"ids": [7, 999, 8]}).pieces
    assert (pieces.bytes, list(pieces.lengths)) == (b"<7><8>", [3, 0, 3])
    messages = [{"role": "user", "content": "Hi", "name": "Bo"}, {"role": "bot", "content": "?"}]
    text = ask(attachment, 4, render_chat={"messages": messages}).text
    assert text == "user(Bo): Hi|bot(): ?|"


def test_a_failed_tokenizer_call_has_its_reason(attach: Attach) -> None:
    attachment = attach(ScriptedRunner())
    invalid = ask(attachment, 1, tokenize={"text": "?"}).failure
    assert (invalid.is_invalid, invalid.message) == (True, "A question mark is no text.")
    unknown = ask(attachment, 2, detokenize={"ids": [1000]}).failure
    assert (unknown.is_invalid, unknown.message) == (True, "A token id is not in the vocabulary.")
    infill = ask(attachment, 3, infill={"prefix": "a", "suffix": "b"}).failure
    assert infill.is_invalid
    newer = ask(attachment, 4).failure
    assert not newer.is_invalid


def test_a_tokenizer_call_that_finds_the_device_lost_reloads_it(attach: Attach) -> None:
    class DyingRunner(ScriptedRunner):
        def tokenize(self, text: str, begins: bool) -> list[int]:
            if self.loads == 1:
                raise DeviceLost("the chip is gone")
            return [1]

    attachment = attach(DyingRunner())
    attachment.say(question={"question": 1, "tokenize": {"text": "a"}})
    assert attachment.receive("crashed").reason == "the chip is gone"
    said = dict(attachment.receive_any("answer", "ready") for _ in range(2))
    assert not said["answer"].failure.is_invalid
    assert said["ready"].slots == 2
    assert ask(attachment, 2, tokenize={"text": "a"}).ids.ids == [1]


def test_an_oversized_answer_is_a_failure(attach: Attach) -> None:
    class WordyRunner(ScriptedRunner):
        def tokenize(self, text: str, begins: bool) -> list[int]:
            return [999] * (wire.MAX_MESSAGE_BYTES // 2)

    failure = ask(attach(WordyRunner()), 1, tokenize={"text": "a"}).failure
    assert failure.is_invalid


def test_tokenizer_calls_are_answered_while_the_device_computes(attach: Attach) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        gate.enter(request)
        return None

    attachment = attach(ScriptedRunner(act, slots=1))
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 5, "credit": 5})
    attachment.receive("accepted")
    gate.await_entered()
    assert ask(attachment, 1, tokenize={"text": "ab"}).ids.ids == [97, 98]
    gate.open()


def test_tokenizer_calls_over_the_queue_capacity_fail(attach: Attach) -> None:
    gate = Gate()

    class SlowRunner(ScriptedRunner):
        def tokenize(self, text: str, begins: bool) -> list[int]:
            gate.enter(Request(prompt=(0,), max_tokens=1))
            return [1]

    attachment = attach(SlowRunner())
    for number in range(answers.THREADS):
        attachment.say(question={"question": number, "tokenize": {"text": "a"}})
        gate.await_entered()
    for number in range(answers.CAPACITY + 1):
        attachment.say(question={"question": 100 + number, "tokenize": {"text": "a"}})
    refused = attachment.receive("answer")
    assert refused.question == 100 + answers.CAPACITY
    assert not refused.failure.is_invalid
    gate.open()
    answered = {attachment.receive("answer").question for _ in range(answers.CAPACITY)}
    assert len(answered) == answers.CAPACITY


def test_heartbeats_report_the_duration_of_a_device_call(attach: Attach) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        gate.enter(request)
        emit(Token(7, b""))
        return None

    attachment = attach(ScriptedRunner(act))
    assert attachment.heartbeats.get(timeout=20) == 0
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 2, "credit": 1})
    attachment.receive("accepted")
    gate.await_entered()
    beats = [attachment.heartbeats.get(timeout=20)]
    while beats[-1] < 100:
        beats.append(attachment.heartbeats.get(timeout=20))
    # Five intervals of 20 ms are 100 ms; a busy machine may miss some.
    assert len([beat for beat in beats if beat > 0]) >= 2
    gate.open()
    attachment.receive("step")
    # The sequence now waits for credit, so no device call is running.
    await_beat_below(attachment, 1)


def await_beat_below(attachment: Attachment, step_ms: int) -> None:
    """Returns when a heartbeat reports a shorter call than `step_ms`. Fails if the call goes on."""
    while (beat := attachment.heartbeats.get(timeout=20)) >= step_ms:
        assert beat < step_ms + 3000


def test_a_busy_python_loop_does_not_stop_heartbeats(attach: Attach) -> None:
    is_over: list[bool] = []

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        while not is_over:
            pass
        return None

    attachment = attach(ScriptedRunner(act))
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 2, "credit": 1})
    attachment.receive("accepted")
    while attachment.heartbeats.get(timeout=20) < 200:
        pass
    is_over.append(True)


def test_checking_for_cancellation_restarts_the_call_duration(attach: Attach) -> None:
    gate, later = Gate(), Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        gate.enter(request)
        cancelled()
        later.enter(request)
        return None

    attachment = attach(ScriptedRunner(act))
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 2, "credit": 1})
    attachment.receive("accepted")
    gate.await_entered()
    longest = 0
    while longest < 100:
        longest = attachment.heartbeats.get(timeout=20)
    gate.open()
    later.await_entered()
    await_beat_below(attachment, longest)
    later.open()
