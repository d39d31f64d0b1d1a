"""Tokens, ends, failures and cancellation of sequences."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from conftest import Attach
from engine import Attachment, Tokens
from runners import STOP, Gate, ScriptedRunner, count, token

from tokenway_worker import (
    Cancelled,
    DeviceLost,
    Emit,
    Failed,
    Invalid,
    Logprobs,
    Request,
    Token,
    TopLogprob,
)

GOES_ON, STOPPED, LENGTH, FAILED = range(4)


def submit(attachment: Attachment, sequence: int, **fields: Any) -> None:
    """Submits a sequence of five tokens with enough credit, unless the fields say otherwise."""
    said = {"prompt": [5], "max_tokens": 5, "credit": 100, **fields}
    attachment.say(submit={"sequence": sequence, **said})


def assert_silent(attachment: Attachment) -> None:
    """Asserts that the worker has handled all messages and sends nothing but this answer."""
    attachment.say(question={"question": 77, "detokenize": {"ids": []}})
    assert attachment.receive("answer").question == 77


def test_tokens_arrive_in_order_and_the_last_carries_the_end(attach: Attach) -> None:
    attachment = attach(ScriptedRunner())
    submit(attachment, 1)
    assert attachment.receive("accepted").sequence == 1
    tokens = attachment.receive_steps(1)
    assert tokens.ids == [100, 101, 102, 103, 104]
    assert tokens.data == b"<100><101><102><103><104>"
    assert tokens.first_index == 0
    assert tokens.end == LENGTH
    assert 104 in tokens.steps[-1].ids, "the end comes with the last token"
    assert not tokens.steps[-1].emitted_ns, "timestamps were not requested"
    assert_silent(attachment)


def test_max_tokens_ends_a_runner_that_does_not_count(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        while True:
            emit(token(7))

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, max_tokens=3)
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.ids, tokens.end) == ([7, 7, 7], LENGTH)


def test_the_token_that_stops_a_sequence_is_its_last(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        assert request.is_end(STOP, is_eos=True)
        assert not request.is_end(7, is_eos=False)
        assert request.is_end(8, is_eos=False)
        emit(token(7))
        return token(STOP)

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, stop_token_ids=[8])
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.ids, tokens.data, tokens.end) == ([7, STOP], b"<7>", STOPPED)
    assert tokens.steps[-1].ids[-1] == STOP, "the end comes with the last token"


@pytest.mark.parametrize(
    ("last", "fields", "end"),
    [
        (104, {}, LENGTH),
        (104, {"ignore_eos": True}, LENGTH),
        (104, {"stop_token_ids": [104]}, STOPPED),
        (STOP, {}, STOPPED),
    ],
)
def test_the_last_of_max_tokens_may_be_returned(
    attach: Attach, last: int, fields: dict[str, Any], end: int
) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        for index in range(4):
            emit(token(100 + index))
        return token(last)

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, **fields)
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.ids, tokens.end) == ([100, 101, 102, 103, last], end)
    assert_silent(attachment)


def test_a_sequence_without_credit_does_not_delay_others(attach: Attach) -> None:
    attachment = attach(ScriptedRunner())
    submit(attachment, 1, credit=2)
    attachment.receive("accepted")
    slow = Tokens(1)
    while len(slow.ids) < 2:
        slow.take(attachment.receive("step"))
    submit(attachment, 2)
    assert attachment.receive("accepted").sequence == 2
    assert attachment.receive_steps(2).ids == [100, 101, 102, 103, 104]
    assert_silent(attachment)
    attachment.say(credit={"grants": [{"sequence": 2, "tokens": 9}, {"sequence": 1, "tokens": 2}]})
    while len(slow.ids) < 4:
        slow.take(attachment.receive("step"))
    assert_silent(attachment)
    attachment.say(credit={"grants": [{"sequence": 1, "tokens": 1}]})
    slow.take(attachment.receive("step"))
    assert (slow.ids, slow.end) == ([100, 101, 102, 103, 104], LENGTH)


def test_no_token_is_made_without_credit(attach: Attach) -> None:
    made: list[int] = []

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        while True:
            made.append(len(made))
            emit(token(made[-1]))

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, credit=2)
    attachment.receive("accepted")
    tokens = Tokens(1)
    while len(tokens.ids) < 2:
        tokens.take(attachment.receive("step"))
    assert_silent(attachment)
    assert made == [0, 1]


def test_the_token_that_stops_a_sequence_needs_credit_too(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        emit(token(7))
        return token(STOP)

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, credit=1)
    attachment.receive("accepted")
    assert attachment.receive("step").sequences[0].ids == [7]
    assert_silent(attachment)
    attachment.say(credit={"grants": [{"sequence": 1, "tokens": 1}]})
    [part] = attachment.receive("step").sequences
    assert (part.first_index, part.ids, part.end) == (1, [STOP], STOPPED)


def test_nothing_is_sent_after_a_cancel_and_the_slot_is_free(attach: Attach) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (5,):
            emit(token(7))
            gate.enter(request)
            assert cancelled()
        return count(request, emit, cancelled)

    runner = ScriptedRunner(act, slots=1)
    attachment = attach(runner)
    submit(attachment, 1)
    attachment.receive("accepted")
    attachment.receive("step")
    gate.await_entered()
    attachment.say(cancel={"sequences": [1, 99]})
    # The next sequence waits for the slot, because the device call is still running.
    submit(attachment, 2, prompt=[6])
    assert_silent(attachment)
    gate.open()
    assert runner.left.get(timeout=20) == (5, True)
    assert attachment.receive("accepted").sequence == 2
    assert attachment.receive_steps(2).end == LENGTH
    assert_silent(attachment)


def test_a_sequence_cancelled_while_it_waits_never_runs(attach: Attach) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (5,):
            gate.enter(request)
        return count(request, emit, cancelled)

    runner = ScriptedRunner(act, slots=1)
    attachment = attach(runner)
    submit(attachment, 1)
    attachment.receive("accepted")
    gate.await_entered()
    attachment.say(cancel={"sequences": [1]})
    submit(attachment, 2, prompt=[6])
    attachment.say(cancel={"sequences": [2]})
    submit(attachment, 3, prompt=[7])
    assert_silent(attachment)
    gate.open()
    assert attachment.receive("accepted").sequence == 3
    assert attachment.receive_steps(3).end == LENGTH
    assert runner.checked == [(5,), (7,)]


def test_a_cancel_wakes_sequences_that_wait_or_sleep(attach: Attach) -> None:
    asleep = threading.Event()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (5,):
            return count(request, emit, cancelled)
        asleep.set()
        assert cancelled.wait(3600)
        emit(token(7))
        return None

    runner = ScriptedRunner(act)
    attachment = attach(runner)
    submit(attachment, 1, prompt=[5], credit=1)
    attachment.receive("accepted")
    attachment.receive("step")
    submit(attachment, 2, prompt=[6])
    attachment.receive("accepted")
    assert asleep.wait(20)
    started_s = time.monotonic()
    attachment.say(cancel={"sequences": [1, 2]})
    assert {runner.left.get(timeout=20) for _ in range(2)} == {(5, True), (6, True)}
    assert time.monotonic() - started_s < 1.0
    assert_silent(attachment)


def test_a_resumed_sequence_starts_after_its_delivered_tokens(attach: Attach) -> None:
    attachment = attach(ScriptedRunner())
    submit(attachment, 1, delivered=[100, 101], max_tokens=5)
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.first_index, tokens.ids, tokens.end) == (2, [102, 103, 104], LENGTH)


@pytest.mark.parametrize(
    ("fields", "is_invalid", "message"),
    [
        ({"prompt": [13]}, True, "13 is not lucky."),
        ({"prompt": []}, True, "The prompt is empty."),
        ({"prompt": [1000]}, True, "A token id is not in the vocabulary."),
        ({"delivered": [1000]}, True, "A token id is not in the vocabulary."),
        (
            {"prompt": [5] * 96},
            True,
            "The prompt and max_tokens exceed the context length.",
        ),
        ({"delivered": [5] * 5}, True, "The resumed request already has max_tokens tokens."),
    ],
)
def test_an_invalid_sequence_is_rejected_and_the_slot_stays_free(
    attach: Attach, fields: dict[str, Any], is_invalid: bool, message: str
) -> None:
    attachment = attach(ScriptedRunner(slots=1))
    submit(attachment, 1, **fields)
    refused = attachment.receive("refused")
    assert refused.sequence == 1
    assert (refused.failure.is_invalid, refused.failure.message) == (is_invalid, message)
    submit(attachment, 2)
    attachment.receive("accepted")
    assert attachment.receive_steps(2).end == LENGTH


def test_more_sequences_than_slots_are_rejected(attach: Attach) -> None:
    attachment = attach(ScriptedRunner(slots=1))
    submit(attachment, 1, credit=1)
    attachment.receive("accepted")
    attachment.receive("step")
    submit(attachment, 2)
    refused = attachment.receive("refused")
    assert (refused.sequence, refused.failure.is_invalid) == (2, False)


@pytest.mark.parametrize(
    ("error", "is_invalid", "message"),
    [
        (Invalid("Too odd."), True, "Too odd."),
        (Failed("out of memory"), False, "out of memory"),
        (ValueError("the prompt was 'secret'"), False, "the runner raised ValueError"),
        (SystemExit(3), False, "the runner raised SystemExit"),
        (None, False, "the runner left the sequence without an end"),
    ],
)
def test_a_failing_sequence_ends_with_its_reason(
    attach: Attach,
    caplog: pytest.LogCaptureFixture,
    error: BaseException | None,
    is_invalid: bool,
    message: str,
) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        emit(token(7))
        if error:
            raise error
        return None

    attachment = attach(ScriptedRunner(act, slots=1))
    submit(attachment, 1)
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.ids, tokens.end) == ([7], FAILED)
    assert (tokens.failure.is_invalid, tokens.failure.message) == (is_invalid, message)
    assert "secret" not in caplog.text
    submit(attachment, 2, prompt=[6])
    attachment.receive("accepted")
    assert attachment.receive_steps(2).end == LENGTH


def test_a_failure_before_the_first_token_has_the_next_index(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        raise Failed("no memory")

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, delivered=[100, 101])
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.first_index, tokens.ids, tokens.end) == (2, [], FAILED)


def test_a_lost_device_drops_its_sequences_and_is_reloaded(attach: Attach) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (5,):
            raise DeviceLost("the chip is gone")
        if request.prompt == (6,):
            gate.enter(request)
        return count(request, emit, cancelled)

    runner = ScriptedRunner(act)
    attachment = attach(runner)
    submit(attachment, 1, prompt=[6])
    attachment.receive("accepted")
    gate.await_entered()
    submit(attachment, 2, prompt=[5])
    attachment.receive("accepted")
    assert attachment.receive("crashed").reason == "the chip is gone"
    # The worker is ready again only after the other sequence has left the device. A sequence that
    # the engine submitted before it knew of the loss is ignored, also if it arrives late.
    submit(attachment, 3, prompt=[7])
    lost = attachment.generation
    gate.open()
    attachment.receive("ready")
    assert runner.loads == 2
    attachment.generation, ready = lost, attachment.generation
    submit(attachment, 5, prompt=[7])
    attachment.generation = ready
    submit(attachment, 4, prompt=[7])
    attachment.receive("accepted")
    assert attachment.receive_steps(4).ids == [100, 101, 102, 103, 104]


def test_a_scored_prompt_is_sent_first_with_its_own_indices(attach: Attach) -> None:
    def scored(id: int, logprob: float | None, is_prompt: bool) -> Token:
        top = (TopLogprob(id, b"<top>", float("-inf")),)
        return Token(
            id, b"x", logprobs=Logprobs(logprob, b"<name>", top), is_prompt=is_prompt, due_ns=5
        )

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        assert (request.logprobs, request.scores_prompt, request.stamps) == (1, True, True)
        emit(scored(request.prompt[0], None, True))
        emit(scored(request.prompt[1], -1.5, True))
        emit(scored(7, -2.5, False))
        return None

    attachment = attach(ScriptedRunner(act))
    asks = {"logprobs": 1, "scores_prompt": True, "stamps": True}
    before_ns = time.monotonic_ns()
    submit(attachment, 1, prompt=[5, 6], max_tokens=1, credit=1, **asks)
    attachment.receive("accepted")
    prompt, completion = Tokens(1), Tokens(1)
    for tokens in (prompt, prompt, completion):
        step = attachment.receive("step")
        assert step.sequences[0].is_prompt == (tokens is prompt)
        tokens.take(step)
        attachment.say(credit={"grants": [{"sequence": 1, "tokens": 1}]})
    assert (prompt.ids, prompt.first_index) == ([5, 6], 0)
    assert (completion.ids, completion.first_index, completion.end) == ([7], 0, LENGTH)
    first, last = prompt.steps[0], completion.steps[0]
    assert not first.logprobs[0].HasField("logprob")
    assert first.logprobs[0].top[0].logprob == -9999.0
    assert (last.logprobs[0].logprob, last.logprobs[0].token_bytes) == (-2.5, b"<name>")
    assert list(last.due_ns) == [5]
    assert before_ns < last.emitted_ns[0] < time.monotonic_ns()


def test_scoring_alone_ends_with_the_last_prompt_token(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        for id in request.prompt:
            emit(Token(id, b"", is_prompt=True, logprobs=Logprobs(-1.5, b"<name>")))
        return None

    attachment = attach(ScriptedRunner(act))
    submit(attachment, 1, prompt=[5, 6], max_tokens=0, scores_prompt=True)
    attachment.receive("accepted")
    tokens = attachment.receive_steps(1)
    assert (tokens.ids, tokens.end) == ([5, 6], LENGTH)


def test_a_runner_receives_every_request_field(attach: Attach) -> None:
    given: list[Request] = []

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        given.append(request)
        return token(STOP)

    attachment = attach(ScriptedRunner(act, slots=1))
    sampling = {
        "seed": 2**64 - 1,
        "choice": 3,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {9: -100.0},
    }
    submit(
        attachment,
        1,
        sampling=sampling,
        stop_token_ids=[8],
        ignore_eos=True,
        min_tokens=2,
        user="somebody",
    )
    attachment.receive("accepted")
    attachment.receive("step")
    submit(attachment, 2)
    attachment.receive("accepted")
    attachment.receive("step")
    request, bare = given
    assert bare.sampling.repetition_penalty == 1.0, "0 cannot be requested"
    said = {name: getattr(request.sampling, name) for name in sampling}
    assert said == sampling
    assert (request.prompt, request.delivered, request.max_tokens) == ((5,), (), 5)
    assert request.stop_token_ids == frozenset([8])
    assert (request.ignore_eos, request.min_tokens) == (True, 2)
    assert (request.user, request.slot, request.logprobs) == ("somebody", 0, None)
