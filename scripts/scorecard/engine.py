"""An OpenAI-compatible engine that answers each completion as a script says.

It writes to raw sockets, so that it can end a response at any byte.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from .http1 import MAX_HEAD, Head, UncleanEnd, read_body, read_head

Json = dict[str, Any]

# Time between two chunks, so that each reaches the client before the next step.
PACE = 0.01
MODELS = {
    "object": "list",
    "data": [{"id": "m", "object": "model", "created": 7, "owned_by": "llamacpp"}],
}
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Do(Enum):
    """Steps without data."""

    STREAM_HEAD = auto()
    """Sends the head of a streamed response."""
    END = auto()
    """Ends the body of a streamed response. The connection stays open."""
    FIN = auto()
    """Closes the connection."""
    RST = auto()
    """Resets the connection."""
    WAIT_FOR_CLOSE = auto()
    """Is silent until the gateway closes the connection."""


@dataclass(frozen=True)
class Chunk:
    """Sends these bytes as one chunk of a streamed response."""

    data: bytes


@dataclass(frozen=True)
class Raw:
    """Sends these bytes as they are."""

    data: bytes


@dataclass(frozen=True)
class Answer:
    """Sends a whole response."""

    status: int
    body: Json
    headers: tuple[str, ...] = ()

    def encode(self) -> bytes:
        body = json.dumps(self.body).encode()
        lines = [
            f"HTTP/1.1 {self.status} Scripted",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *self.headers,
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


Step = Do | Chunk | Raw | Answer


@dataclass
class Received:
    """A completion request that the engine received."""

    path: str
    body: Json
    at: float
    number: int
    """Number of completion requests before this one."""
    closed_at: float | None = None
    """Time when the gateway closed the connection during the response."""

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


Script = Callable[[Received], list[Step]]


@dataclass
class Engine:
    """An engine that runs from `start` to `stop`."""

    script: Script
    port: int = 0
    received: list[Received] = field(default_factory=list)
    listed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the gateway has asked for the models or the health."""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        """Listens on the port, or on a free one at the first start."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=MAX_HEAD
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Closes the listener and all connections."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (UncleanEnd, OSError, asyncio.CancelledError):
            pass  # The gateway closed the connection, or the engine stops.
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_open = True
        while is_open:
            head = await read_head(reader)
            body = b"".join([part async for part in read_body(reader, head)])
            if head.words[1].endswith("/completions"):
                is_open = await self._complete(head, json.loads(body), reader, writer)
            else:
                writer.write(self._facts(head.words[1]).encode())

    def _facts(self, path: str) -> Answer:
        self.listed.set()
        if path.endswith("/models"):
            return Answer(200, MODELS)
        if path.endswith("/health"):
            return Answer(200, {"status": "ok"})
        return Answer(404, {"error": {"message": "not found"}})

    async def _complete(
        self, head: Head, body: Json, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers a completion. Returns false if the connection is closed."""
        request = Received(head.words[1], body, time.monotonic(), len(self.received))
        self.received.append(request)
        for step in self.script(request):
            match step:
                case Chunk(data):
                    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    await asyncio.sleep(PACE)
                case Raw(data):
                    writer.write(data)
                    await asyncio.sleep(PACE)
                case Answer():
                    writer.write(step.encode())
                case Do.STREAM_HEAD:
                    writer.write(STREAM_HEAD)
                case Do.END:
                    writer.write(b"0\r\n\r\n")
                case Do.FIN:
                    return False
                case Do.RST:
                    reset(writer)
                    return False
                case Do.WAIT_FOR_CLOSE:
                    with suppress(OSError):
                        await reader.read()
                    request.closed_at = time.monotonic()
                    return False
        return True


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes the connection with an RST."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
