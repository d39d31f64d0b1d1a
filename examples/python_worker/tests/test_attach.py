"""Connecting to an engine, reconnecting, draining and stopping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from conftest import Attach, Running
from engine import REFUSAL, Attachment, Engine
from runners import Gate, ScriptedRunner, count

from tokenway_worker import Cancelled, Emit, Request, Token

Start = Callable[[ScriptedRunner], Running]


def test_a_worker_sends_its_identity_and_its_model(start: Start, engine: Engine) -> None:
    start(ScriptedRunner(slots=3))
    attachment = engine.attached()
    hello = attachment.welcome()
    assert hello.protocol_version == 2
    assert (hello.model, hello.name, hello.child_token) == ("model", "worker-7", "secret")
    ready = attachment.receive("ready")
    assert ready.slots == 3
    assert ready.model.runner == "scripted"
    assert ready.model.context_length == 100
    assert ready.model.max_prompt_bytes == 100
    assert ready.model.vocabulary_size == 1000
    assert ready.model.resumption == 1
    assert ready.model.unsupported == ["suffix"]
    assert (ready.model.bos_token, ready.model.eos_token) == ("<s>", "</s>")


def test_only_hello_is_sent_before_the_welcome(start: Start, engine: Engine) -> None:
    runner = ScriptedRunner()
    running = start(runner)
    attachment = engine.attached()
    attachment.receive("hello")
    running.stop()
    attachment.receive_end()
    assert attachment.heartbeats.empty()
    assert runner.loads == 0


def test_loading_progress_is_reported(start: Start, engine: Engine) -> None:
    class LoadingRunner(ScriptedRunner):
        def load(self, progress: Callable[[float], None]) -> None:
            progress(0.5)
            gate.enter(Request(prompt=(0,), max_tokens=1))
            progress(1.0)

    gate = Gate()
    start(LoadingRunner())
    attachment = engine.attached()
    attachment.welcome()
    assert attachment.receive("loading").fraction == 0.5
    # Heartbeats are sent while the model loads.
    beats = [attachment.heartbeats.get(timeout=20) for _ in range(3)]
    assert beats == [0, 0, 0]
    gate.open()
    assert attachment.receive("loading").fraction == 1.0
    attachment.receive("ready")


@pytest.mark.parametrize("error", ["no such file", "x" * 2000])
def test_a_model_that_cannot_be_loaded_ends_the_worker(
    start: Start, engine: Engine, error: str
) -> None:
    runner = ScriptedRunner()
    runner.load_error = error
    running = start(runner)
    attachment = engine.attached()
    attachment.welcome()
    assert attachment.receive("load_failed").reason == error[:1024]
    attachment.receive_end()
    assert running.code() == 1


def test_the_worker_retries_until_the_engine_is_up(
    start: Start, engine: Engine, path: Path
) -> None:
    engine.die()
    start(ScriptedRunner())
    late = Engine(path)
    late.attached().welcome()
    late.die()


def test_the_worker_reconnects_and_drops_running_sequences(
    attach: Attach, engine: Engine, path: Path
) -> None:
    runner = ScriptedRunner()
    attachment = attach(runner)
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 9, "credit": 1})
    attachment.receive("accepted")
    attachment.receive("step")
    engine.die()
    assert runner.left.get(timeout=20) == (5, True)

    back = Engine(path)
    attachment = back.attached()
    attachment.welcome()
    assert attachment.receive("ready").slots == 2
    assert runner.loads == 1, "the model stays loaded"
    attachment.say(submit={"sequence": 1, "prompt": [6], "max_tokens": 2, "credit": 9})
    attachment.receive("accepted")
    assert attachment.receive_steps(1).ids == [100, 101]
    back.die()


def test_a_reconnected_worker_is_ready_only_when_its_slots_are_free(
    attach: Attach, engine: Engine
) -> None:
    gate = Gate()

    def act(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        gate.enter(request)
        return count(request, emit, cancelled)

    attachment = attach(ScriptedRunner(act))
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 9, "credit": 9})
    attachment.receive("accepted")
    gate.await_entered()
    attachment.end()

    again = engine.attached()
    again.welcome()
    again.say(question={"question": 1, "tokenize": {"text": "a"}})
    again.receive("answer")
    gate.open()
    again.receive("ready")


def refuse(attachment: Attachment, code: grpc.StatusCode, is_welcome: bool) -> None:
    if is_welcome:
        attachment.welcome()
        attachment.receive("ready")
    else:
        attachment.receive("hello")
    attachment.refuse(code)


@pytest.mark.parametrize("is_welcome", [False, True])
@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
)
def test_a_rejected_worker_exits_with_the_reason(
    start: Start,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
    is_welcome: bool,
) -> None:
    running = start(ScriptedRunner())
    refuse(engine.attached(), code, is_welcome)
    assert running.code() == 1
    assert f"the engine rejects this worker: {REFUSAL}" in caplog.text


@pytest.mark.parametrize(
    ("is_welcome", "says"),
    [(False, "cannot connect to an engine at "), (True, "lost the engine at ")],
)
@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
    ],
)
def test_every_other_status_is_retried(
    start: Start,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
    is_welcome: bool,
    says: str,
) -> None:
    start(ScriptedRunner())
    refuse(engine.attached(), code, is_welcome)
    engine.attached().receive("hello")
    [warning] = [it.getMessage() for it in caplog.records if it.levelname == "WARNING"]
    assert warning == f"{says}{engine.target}, reconnecting: {code.name}: {REFUSAL}"


def test_a_drained_worker_ends_with_its_last_sequence(start: Start, engine: Engine) -> None:
    runner = ScriptedRunner()
    running = start(runner)
    attachment = engine.attached()
    attachment.welcome()
    attachment.receive("ready")
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 3, "credit": 1})
    attachment.receive("accepted")
    attachment.receive("step")
    attachment.say(drain={})
    refuse_another(attachment)
    attachment.say(credit={"grants": [{"sequence": 1, "tokens": 2}]})
    assert attachment.receive_steps(1).ids == [101, 102]
    attachment.receive_end()
    assert running.code() == 0


def refuse_another(attachment: Attachment) -> None:
    attachment.say(submit={"sequence": 2, "prompt": [5], "max_tokens": 3, "credit": 1})
    assert not attachment.receive("refused").failure.is_invalid


def test_a_drained_worker_ends_when_its_last_sequence_is_cancelled(
    start: Start, engine: Engine
) -> None:
    running = start(ScriptedRunner())
    attachment = engine.attached()
    attachment.welcome()
    attachment.receive("ready")
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 3, "credit": 1})
    attachment.receive("accepted")
    attachment.receive("step")
    attachment.say(drain={})
    attachment.say(cancel={"sequences": [1]})
    attachment.receive_end()
    assert running.code() == 0


def test_an_idle_worker_ends_when_it_is_drained(start: Start, engine: Engine) -> None:
    running = start(ScriptedRunner())
    attachment = engine.attached()
    attachment.welcome()
    attachment.receive("ready")
    attachment.say(drain={})
    attachment.receive_end()
    assert running.code() == 0


def test_a_protocol_violation_of_a_draining_worker_exits_with_1(
    start: Start, engine: Engine
) -> None:
    running = start(ScriptedRunner())
    attachment = engine.attached()
    attachment.welcome()
    attachment.receive("ready")
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 3, "credit": 1})
    attachment.receive("accepted")
    attachment.say(drain={})
    attachment.refuse(grpc.StatusCode.FAILED_PRECONDITION)
    assert running.code() == 1


def test_a_stopped_worker_ends_its_stream(start: Start, engine: Engine) -> None:
    runner = ScriptedRunner()
    running = start(runner)
    attachment = engine.attached()
    attachment.welcome()
    attachment.receive("ready")
    attachment.say(submit={"sequence": 1, "prompt": [5], "max_tokens": 9, "credit": 1})
    attachment.receive("accepted")
    attachment.receive("step")
    running.worker.stop()
    attachment.receive_end()
    assert running.code() == 0
    assert runner.left.get(timeout=20) == (5, True)
