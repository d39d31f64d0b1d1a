"""A fake engine that only serves `Attach` of `worker.proto` on a Unix socket.

Every wait ends after `TIMEOUT_S` at the latest, so a failing test does not hang.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from tokenway_worker import wire

TIMEOUT_S = 20.0

HEARTBEAT_MS = 20

# Message of a rejection.
REFUSAL = "the worker is rejected"


# Fields of `submit` itself. All others are fields of its request.
SUBMIT_FIELDS = ("sequence", "generation", "credit", "choice", "delivered", "request_id")


def submit_message(fields: dict[str, Any]) -> dict[str, Any]:
    """Builds a submit. The fields have the names of a runner's `Request`."""
    sampling = fields.pop("sampling", {})
    fields = {**fields, **sampling}
    submit = {name: fields.pop(name) for name in SUBMIT_FIELDS if name in fields}
    request: dict[str, Any] = {"prompt_token_ids": {"ids": fields.pop("prompt", [])}}
    for name, field in (("scores_prompt", "echo"), ("stamps", "include_stamps")):
        if name in fields:
            request[field] = fields.pop(name)
    if "seed" in fields:
        # On the wire, the seed has a sign.
        fields["seed"] = (fields["seed"] + 2**63) % 2**64 - 2**63
    return {**submit, "request": {**request, **fields}}


class Attachment:
    """The engine's end of one worker's stream."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._status: grpc.StatusCode | None = None
        self.heartbeats: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Last generation for which the worker sent `ready`.
        self.generation = 0

    def say(self, **message: Any) -> None:
        """Sends a message. A submit has the fields of its request beside its own."""
        if "submit" in message:
            message["submit"] = submit_message({"generation": self.generation, **message["submit"]})
        self._said.put(wire.message_class("AttachResponse")(**message))

    def receive(self, kind: str) -> Any:
        """The next message, without heartbeats. Asserts its kind."""
        message = self._received.get(timeout=TIMEOUT_S)
        assert message is not None, f"the stream ended before {kind}"
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def receive_any(self, *kinds: str) -> tuple[str, Any]:
        """The next message and its kind, which must be one of these."""
        message = self._received.get(timeout=TIMEOUT_S)
        assert message is not None, f"the stream ended before any of {kinds}"
        kind: str = message.WhichOneof("message")
        assert kind in kinds, message
        return kind, getattr(message, kind)

    def receive_end(self) -> None:
        """Asserts that the worker ends the stream with no message before."""
        message = self._received.get(timeout=TIMEOUT_S)
        assert message is None, message

    def receive_steps(self, sequence: int) -> Tokens:
        """All tokens of a sequence until its end. No other sequence may run."""
        tokens = Tokens(sequence)
        while not tokens.end:
            tokens.take(self.receive("step"))
        return tokens

    def welcome(self) -> Any:
        """Receives `hello` and sends `welcome`."""
        hello = self.receive("hello")
        self.say(welcome={"heartbeat_interval_ms": HEARTBEAT_MS, "heartbeat_timeout_ms": 2000})
        return hello

    def end(self) -> None:
        """Ends the stream."""
        self._said.put(None)

    def refuse(self, code: grpc.StatusCode) -> None:
        """Ends the stream with a status."""
        self._status = code
        self._said.put(None)

    def listen(self, requests: Iterator[Any]) -> None:
        """Receives messages until the worker ends the stream."""
        try:
            for request in requests:
                if request.WhichOneof("message") == "ready":
                    self.generation = request.ready.generation
                if request.WhichOneof("message") == "heartbeat":
                    self.heartbeats.put(request.heartbeat.step_ms)
                else:
                    self._received.put(request)
        except grpc.RpcError:
            pass
        self._received.put(None)
        # An engine ends the stream when the worker has ended its side.
        self._said.put(None)

    def speak(self) -> Iterator[Any]:
        """Yields the messages for the worker."""
        yield from iter(self._said.get, None)
        if self._status:
            self._context.abort(self._status, REFUSAL)


class Tokens:
    """Received tokens of one sequence, with an engine's checks."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.ids: list[int] = []
        self.data = b""
        self.first_index: int | None = None
        self.end = 0
        self.failure: Any = None
        self.steps: list[Any] = []

    def take(self, step: Any) -> None:
        """Adds the tokens of a step."""
        for part in step.sequences:
            self.take_part(part)

    def take_part(self, part: Any) -> None:
        """Adds the entry of a step that belongs to this sequence."""
        assert part.sequence == self.sequence, part
        assert not self.end, "tokens follow the end"
        assert len(part.lengths) == len(part.ids)
        assert sum(part.lengths) == len(part.bytes)
        if self.first_index is None:
            self.first_index = part.first_index
        assert part.first_index == self.first_index + len(self.ids), "a gap or a repetition"
        self.ids += part.ids
        self.data += part.bytes
        self.end = part.end
        self.steps.append(part)
        if part.HasField("failure"):
            self.failure = part.failure


class Engine:
    """The engine's worker socket: a Unix socket at a path, or an address with TLS."""

    def __init__(
        self, where: Path | str, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self._attached: queue.SimpleQueue[Attachment] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(8))
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self._attach,
            request_deserializer=wire.message_class("AttachRequest").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        service = grpc.method_handlers_generic_handler(
            f"{wire.PACKAGE}.DeviceWorker", {"Attach": handler}
        )
        self._server.add_generic_rpc_handlers((service,))
        if credentials:
            port = self._server.add_secure_port(str(where), credentials)
            self.target = f"localhost:{port}"
        else:
            self.target = f"unix:{where}"
            self._server.add_insecure_port(self.target)
        self._server.start()

    def attached(self) -> Attachment:
        """Waits for the next worker that connects."""
        return self._attached.get(timeout=TIMEOUT_S)

    def die(self) -> None:
        """Breaks all streams and frees the path."""
        self._server.stop(None).wait(TIMEOUT_S)

    def _attach(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        attachment = Attachment(context)
        threading.Thread(target=attachment.listen, args=(requests,), daemon=True).start()
        self._attached.put(attachment)
        return attachment.speak()
