"""The send buffer of a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runners import token

from tokenway_worker import wire
from tokenway_worker.failures import Failure
from tokenway_worker.outgoing import STEP_TOKENS, Outgoing


def outgoing(capacity: int = 10, full: list[bool] | None = None) -> Outgoing:
    return Outgoing(capacity, lambda: 0, lambda: (full or []).append(True))


def taken(out: Outgoing) -> list[Any]:
    """All queued messages."""
    out.close()
    return list(out)


def parts(message: Any) -> list[tuple[int, int, list[int], int]]:
    said = [(it.sequence, it.first_index, list(it.ids), it.end) for it in message.step.sequences]
    assert said, message
    return said


def test_pending_tokens_are_sent_as_one_step() -> None:
    out = outgoing()
    out.token(1, 4, token(10), 0)
    out.token(2, 0, token(20), 0)
    out.token(1, 5, token(11), 0)
    out.end(2, 1, wire.End.LENGTH)
    [step] = taken(out)
    assert parts(step) == [(1, 4, [10, 11], 0), (2, 0, [20], 2)]


def test_prompt_tokens_and_completion_tokens_are_separate_parts() -> None:
    out = outgoing()
    out.token(1, 0, replace(token(5), is_prompt=True), 0)
    out.token(1, 1, replace(token(6), is_prompt=True), 0)
    out.token(1, 0, token(10), 0)
    out.end(1, 1, wire.End.LENGTH)
    first, second = taken(out)
    assert (parts(first), first.step.sequences[0].is_prompt) == ([(1, 0, [5, 6], 0)], True)
    assert (parts(second), second.step.sequences[0].is_prompt) == ([(1, 0, [10], 2)], False)


def test_a_full_step_gives_the_next_step_to_other_sequences() -> None:
    out = outgoing()
    for index in range(STEP_TOKENS + 1):
        out.token(1, index, token(7), 0)
    out.end(1, STEP_TOKENS + 1, wire.End.LENGTH)
    out.token(2, 0, token(20), 0)
    first, second = taken(out)
    [(sequence, first_index, ids, end)] = parts(first)
    assert (sequence, first_index, len(ids), end) == (1, 0, STEP_TOKENS, 0)
    assert parts(second) == [(2, 0, [20], 0), (1, STEP_TOKENS, [7], 2)]


def test_a_forgotten_sequence_sends_nothing() -> None:
    out = outgoing()
    out.token(1, 0, token(10), 0)
    out.token(2, 0, token(20), 0)
    out.forget(1)
    [step] = taken(out)
    assert parts(step) == [(2, 0, [20], 0)]


def test_pending_tokens_are_sent_before_the_stream_ends() -> None:
    out = outgoing()
    out.say(wire.accepted(1))
    out.token(1, 0, token(10), 0)
    out.close()
    out.token(1, 1, token(11), 0)
    out.say(wire.refused(2, Failure(False, "late")))
    accepted: Any
    accepted, step = list(out)
    assert accepted.accepted.sequence == 1
    assert parts(step) == [(1, 0, [10], 0)]


def test_a_full_buffer_breaks_the_stream() -> None:
    full = [False]
    out = outgoing(2, full)
    for sequence in range(3):
        out.say(wire.accepted(sequence))
    assert full == [False, True]
    assert list(out) == []


def test_only_the_latest_progress_is_kept() -> None:
    out = outgoing(2)
    for percent in range(100):
        out.say(wire.loading(percent / 100))
    out.say(wire.crashed("gone"))
    first, last = taken(out)
    assert first.loading.fraction > 0.98
    assert wire.is_loading(first) and not wire.is_loading(last)
