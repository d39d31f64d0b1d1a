"""A fake engine: it serves `Attach` on a Unix socket, as `worker.proto` says, and does nothing
else.

What waits here waits for an event, at most as long as `PATIENCE_S`: a test that fails does not
hang.
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

PATIENCE_S = 20.0

HEARTBEAT_MS = 20

# What a refused worker is told.
REFUSAL = "it is not taken"


class Attachment:
    """One worker's stream, as its engine has it."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._status: grpc.StatusCode | None = None
        self.heartbeats: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Which life of the worker was ready last.
        self.life = 0

    def say(self, **message: Any) -> None:
        """Says this to the worker; what it submits, to the life that is ready."""
        if "submit" in message:
            message["submit"] = {"life": self.life, **message["submit"]}
        self._said.put(wire.message_class("AttachResponse")(**message))

    def hear(self, kind: str) -> Any:
        """The next message besides heartbeats, which must be of this kind."""
        message = self._heard.get(timeout=PATIENCE_S)
        assert message is not None, f"the stream ended before {kind}"
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def hear_any(self, *kinds: str) -> tuple[str, Any]:
        """The next message, which must be of one of these kinds, and of which."""
        message = self._heard.get(timeout=PATIENCE_S)
        assert message is not None, f"the stream ended before any of {kinds}"
        kind: str = message.WhichOneof("message")
        assert kind in kinds, message
        return kind, getattr(message, kind)

    def hear_end(self) -> None:
        """The worker's end of the stream, with nothing before it."""
        message = self._heard.get(timeout=PATIENCE_S)
        assert message is None, message

    def hear_steps(self, sequence: int) -> Tokens:
        """All that comes of a sequence until its end, when nothing else runs."""
        tokens = Tokens(sequence)
        while not tokens.end:
            tokens.take(self.hear("step"))
        return tokens

    def welcome(self) -> Any:
        """Takes the worker on, up to its `ready`."""
        hello = self.hear("hello")
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
        """Hears the worker until its end of the stream."""
        try:
            for request in requests:
                if request.WhichOneof("message") == "ready":
                    self.life = request.ready.life
                if request.WhichOneof("message") == "heartbeat":
                    self.heartbeats.put(request.heartbeat.step_ms)
                else:
                    self._heard.put(request)
        except grpc.RpcError:
            pass
        self._heard.put(None)
        # An engine ends its end of a stream when the worker has ended the other.
        self._said.put(None)

    def speak(self) -> Iterator[Any]:
        """What the worker is to hear."""
        yield from iter(self._said.get, None)
        if self._status:
            self._context.abort(self._status, REFUSAL)


class Tokens:
    """What has come of one sequence, checked as an engine checks it."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.ids: list[int] = []
        self.data = b""
        self.first_index: int | None = None
        self.end = 0
        self.failure: Any = None
        self.steps: list[Any] = []

    def take(self, step: Any) -> None:
        """Takes what a step made of it."""
        for part in step.sequences:
            self.take_part(part)

    def take_part(self, part: Any) -> None:
        """Takes what a step made of one sequence, which must be this one."""
        assert part.sequence == self.sequence, part
        assert not self.end, "something follows the end"
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
        """The next worker that attaches."""
        return self._attached.get(timeout=PATIENCE_S)

    def die(self) -> None:
        """Breaks all streams off and frees the path."""
        self._server.stop(None).wait(PATIENCE_S)

    def _attach(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        attachment = Attachment(context)
        threading.Thread(target=attachment.listen, args=(requests,), daemon=True).start()
        self._attached.put(attachment)
        return attachment.speak()
