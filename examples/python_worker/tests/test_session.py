"""Races that cannot be timed over a socket. The tests take the worker's messages one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engine import HEARTBEAT_MS, submit_message
from google.protobuf.message import Message
from runners import ScriptedRunner

from tokenway_worker import wire
from tokenway_worker.answers import Answers
from tokenway_worker.device import Device
from tokenway_worker.session import Session

Taken = Iterator[Any]


class Scripted:
    """A call with a scripted engine: it takes messages and yields responses."""

    def __init__(self, script: Iterator[dict[str, Any]]) -> None:
        self._script = script

    def __iter__(self) -> Iterator[Any]:
        said = {"welcome": {"heartbeat_interval_ms": HEARTBEAT_MS}}
        yield wire.message_class("AttachResponse")(**said)
        for said in self._script:
            yield wire.message_class("AttachResponse")(**said)

    def cancel(self) -> bool:
        return True


def converse(device: Device, script: Callable[[Taken], Iterator[dict[str, Any]]]) -> None:
    def attach(requests: Iterator[Message]) -> Scripted:
        return Scripted(script(requests))

    Session(device, Answers(device), wire.hello("", "", "")).run(attach)


def take_until(taken: Taken, kind: str) -> list[Any]:
    """The messages up to the first of this kind."""
    messages = [next(taken)]
    while messages[-1].WhichOneof("message") != kind:
        # Heartbeats arrive every 20 ms, so a thousand of them are 20 seconds.
        assert len(messages) < 1000, f"nothing came but {messages[-1]}"
        messages.append(next(taken))
    return messages


def test_a_cancel_drops_an_unsent_end() -> None:
    runner = ScriptedRunner()
    kinds: list[str] = []

    def script(taken: Taken) -> Iterator[dict[str, Any]]:
        take_until(taken, "ready")
        submit = {"sequence": 1, "generation": 1, "prompt": [5], "max_tokens": 3, "credit": 9}
        yield {"submit": submit_message(submit)}
        runner.left.get(timeout=20)
        yield {"cancel": {"sequences": [1]}}
        # A second heartbeat shows that nothing else was queued before it.
        said = take_until(taken, "heartbeat") + take_until(taken, "heartbeat")
        kinds.extend(message.WhichOneof("message") for message in said)

    converse(Device(runner), script)
    assert kinds.count("accepted") == 1
    assert "step" not in kinds


def test_a_device_lost_on_another_stream_is_reported_as_a_crash() -> None:
    runner = ScriptedRunner()
    device = Device(runner)

    def script(taken: Taken) -> Iterator[dict[str, Any]]:
        take_until(taken, "ready")
        device.is_loaded = False
        yield {"question": {"question": 1, "tokenize": {"text": "a"}}}
        take_until(taken, "crashed")
        take_until(taken, "ready")

    converse(device, script)
    assert runner.loads == 2
