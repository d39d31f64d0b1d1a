"""Tokens that violate the protocol. The engine would drop the whole worker for one, so the worker
fails the sequence instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import Attach
from engine import Attachment, Tokens
from runners import STOP, ScriptedRunner, count, token

from tokenway_worker import Cancelled, Emit, Ended, Logprobs, Request, Token, TopLogprob

STOPPED, LENGTH, FAILED = 1, 2, 3

NAN, INFINITE = float("nan"), float("inf")


def token_with_logprob(
    logprob: float | None = -1.5, *top: TopLogprob, token_bytes: bytes = b"x"
) -> Token:
    return Token(7, b"x", logprobs=Logprobs(logprob, token_bytes, top))


def top_logprob(logprob: float = -1.5, id: int = 7, token_bytes: bytes = b"x") -> TopLogprob:
    return TopLogprob(id, token_bytes, logprob)


ASKS: dict[str, Any] = {"logprobs": 1}
SCORES: dict[str, Any] = {"logprobs": 1, "scores_prompt": True}
OF_PROMPT = replace(token_with_logprob(), is_prompt=True)
NO_ID = "emitted an id outside the vocabulary of 1000 tokens"
NO_DATA = "emitted a token whose data is not bytes of at most 1024"
NO_LOGPROB = "emitted a token without the requested logprob"
NO_NUMBER = "emitted a token with a logprob that is not a finite number"
NO_TOKEN_BYTES = "emitted a token whose token_bytes is not bytes of at most 1024"


def run_beside_another(attachment: Attachment, **fields: Any) -> Tokens:
    """Runs a sequence with prompt 5 beside another sequence, which must not be affected."""
    asks = {"max_tokens": 5, "credit": 100}
    attachment.say(submit={"sequence": 1, **asks, "prompt": [6], "credit": 1})
    attachment.receive("accepted")
    attachment.receive("step")
    second = {"sequence": 2, "request_id": "second"}
    attachment.say(submit={**second, **asks, "prompt": [5], **fields})
    attachment.receive("accepted")
    tokens = attachment.receive_steps(2)
    attachment.say(credit={"grants": [{"sequence": 1, "tokens": 4}]})
    assert attachment.receive_steps(1).ids == [101, 102, 103, 104]
    return tokens


@pytest.mark.parametrize(
    ("emitted", "fields", "did"),
    [
        (Token(1000, b"x"), {}, NO_ID),
        (Token(-1, b"x"), {}, NO_ID),
        (Token(7.5, b"x"), {}, NO_ID),  # type: ignore[arg-type]
        (Token(7, b"x" * 1025), {}, NO_DATA),
        (Token(7, "text"), {}, NO_DATA),  # type: ignore[arg-type]
        (Token(7, b"x", due_ns=-1), {}, "emitted a token whose due_ns is not a 64-bit time"),
        (token(7), ASKS, NO_LOGPROB),
        (token_with_logprob(None), ASKS, NO_LOGPROB),
        (token_with_logprob(NAN), ASKS, NO_NUMBER),
        (token_with_logprob(INFINITE), ASKS, NO_NUMBER),
        (token_with_logprob(1e39), ASKS, NO_NUMBER),
        (token_with_logprob(NAN), {}, NO_NUMBER),
        (token_with_logprob(-1.5, top_logprob(NAN)), ASKS, NO_NUMBER),
        (
            token_with_logprob(-1.5, top_logprob(id=1000)),
            ASKS,
            "reported a top logprob of an id outside the vocabulary",
        ),
        (token_with_logprob(token_bytes=b"x" * 1025), ASKS, NO_TOKEN_BYTES),
        (token_with_logprob(-1.5, top_logprob(token_bytes=b"x" * 1025)), ASKS, NO_TOKEN_BYTES),
        (
            token_with_logprob(-1.5, *[top_logprob()] * 21),
            ASKS,
            "emitted a token with more than 20 top logprobs",
        ),
        (OF_PROMPT, {}, "emitted a prompt token that was not requested"),
        (
            token_with_logprob(),
            SCORES,
            "emitted a token before the requested tokens of the prompt",
        ),
        (replace(token(5), is_prompt=True), SCORES, NO_LOGPROB),
    ],
)
def test_an_invalid_token_fails_only_its_sequence(
    attach: Attach,
    caplog: pytest.LogCaptureFixture,
    emitted: Token,
    fields: dict[str, Any],
    did: str,
) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        while True:
            emit(emitted)

    tokens = run_beside_another(attach(ScriptedRunner(act)), **fields)
    assert (tokens.ids, tokens.end) == ([], FAILED)
    assert (tokens.failure.is_invalid, tokens.failure.message) == (False, f"the runner {did}")
    assert f"sequence 2 of request second fails at token 0: the runner {did}" in caplog.text


@pytest.mark.parametrize(
    ("last", "fields", "did"),
    [
        (token(STOP), {"min_tokens": 3}, "ended the sequence before it had min_tokens"),
        (
            token(STOP),
            {"ignore_eos": True, "stop_token_ids": [8]},
            "ended the sequence without a stop token although ignore_eos is set",
        ),
        (Token(1000, b""), {}, NO_ID),
        (
            token(STOP),
            {"delivered": [1], "min_tokens": 4},
            "ended the sequence before it had min_tokens",
        ),
        (None, {}, "left the sequence without an end"),
    ],
)
def test_an_invalid_end_fails_only_its_sequence(
    attach: Attach,
    caplog: pytest.LogCaptureFixture,
    last: Token | None,
    fields: dict[str, Any],
    did: str,
) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        emit(token(7))
        return last

    tokens = run_beside_another(attach(ScriptedRunner(act)), **fields)
    assert (tokens.ids, tokens.end) == ([7], FAILED)
    assert (tokens.failure.is_invalid, tokens.failure.message) == (False, f"the runner {did}")
    at = len(fields.get("delivered", [])) + 1
    assert f"sequence 2 of request second fails at token {at}: the runner {did}" in caplog.text


def test_extra_prompt_tokens_and_a_prompt_token_as_the_end_are_failures(attach: Attach) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        if request.min_tokens == 1:
            return OF_PROMPT
        emit(OF_PROMPT)
        emit(OF_PROMPT)
        return None

    attachment = attach(ScriptedRunner(act))
    more = run_beside_another(attachment, **SCORES)
    assert more.ids == [7]
    assert more.failure.message == "the runner emitted a prompt token that was not requested"
    attachment.say(
        submit={
            "sequence": 3,
            "prompt": [5],
            "max_tokens": 5,
            "credit": 9,
            "min_tokens": 1,
            **SCORES,
        }
    )
    attachment.receive("accepted")
    last = attachment.receive_steps(3)
    assert last.ids == []
    assert last.failure.message == "the runner ended the sequence with a prompt token"


@pytest.mark.parametrize(
    ("last", "fields"),
    [
        (token(STOP), {"min_tokens": 2}),
        (token(STOP), {"delivered": [1], "min_tokens": 3}),
        (token(8), {"ignore_eos": True, "stop_token_ids": [8]}),
    ],
)
def test_a_valid_end_is_accepted(attach: Attach, last: Token, fields: dict[str, Any]) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        emit(token(7))
        return last

    tokens = run_beside_another(attach(ScriptedRunner(act)), **fields)
    assert (tokens.ids, tokens.end) == ([7, last.id], STOPPED)


@pytest.mark.parametrize(("max_tokens", "faulty", "end"), [(2, 7, LENGTH), (5, 1000, FAILED)])
def test_nothing_is_sent_after_the_end(
    attach: Attach, max_tokens: int, faulty: int, end: int
) -> None:
    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        if request.prompt == (6,):
            return count(request, emit, cancelled)
        emit(token(7))
        for id in (faulty, 8, 9):
            try:
                emit(Token(id, b"x"))
            except Ended:
                assert cancelled()
        return token(STOP)

    attachment = attach(ScriptedRunner(act))
    tokens = run_beside_another(attachment, max_tokens=max_tokens)
    assert (tokens.ids, tokens.end) == ([7, 7][: 2 if end == LENGTH else 1], end)
    attachment.say(question={"question": 1, "detokenize": {"ids": []}})
    attachment.receive("answer")
