"""A client that sends one completion request and notes all that it sees."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from .engine import Json
from .http1 import MAX_HEAD, Head, UncleanEnd, read_body, read_head

# A request that lasts longer hangs.
LIMIT = 15.0


class Shape(StrEnum):
    """The API and the form of the response."""

    COMPLETION = "streamed completion"
    CHAT = "streamed chat"
    UNARY = "unary chat"

    @property
    def is_stream(self) -> bool:
        return self is not Shape.UNARY

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Shape.COMPLETION else "/v1/chat/completions"

    def body(self, model: str) -> Json:
        body: Json = {"model": model, "max_tokens": 50}
        if self is Shape.COMPLETION:
            body["prompt"] = "hi"
        else:
            body["messages"] = [{"role": "user", "content": "hi"}]
        if self.is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


@dataclass
class Seen:
    """All that a client sees of one request. Times are those of `time.monotonic`."""

    sent: float
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    """The texts of choice 0."""
    last_text: float | None = None
    """Time of the last event with a text or a finish reason."""
    finish_reason: str | None = None
    has_done: bool = False
    models: list[str] = field(default_factory=list)
    """The models that the response names, each once."""
    usage: Json = field(default_factory=dict)
    error: Json | None = None
    malformed: list[str] = field(default_factory=list)
    """Events that are no JSON."""
    unknown: int = 0
    """Number of events that are neither choices, nor usage, nor an error."""
    ended: float | None = None
    """Time of the end. `None` if the response hung."""
    unclean: str | None = None
    """The way in which the connection ended, if it ended before the response did."""

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.sent


class Client:
    """One request on its own connection."""

    def __init__(self, port: int, key: str | None, model: str, shape: Shape) -> None:
        self.port = port
        self.authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self.shape = shape
        self.body = json.dumps(shape.body(model)).encode()
        self.seen = Seen(time.monotonic())
        self.has_text = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> Seen:
        """Sends the request and reads the response to its end, for at most `LIMIT` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LIMIT):
                try:
                    await self._exchange()
                except (UncleanEnd, OSError) as end:
                    self.seen.unclean = str(end)
                self.seen.ended = time.monotonic()
        self.leave()
        return self.seen

    def leave(self) -> float:
        """Closes the connection. Returns the time."""
        if self._writer is not None:
            self._writer.transport.abort()
        return time.monotonic()

    async def _exchange(self) -> None:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MAX_HEAD)
        self.seen.sent = time.monotonic()
        accept = "text/event-stream" if self.shape.is_stream else "application/json"
        head = (
            f"POST {self.shape.path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n"
            f"content-type: application/json\r\naccept: {accept}\r\n"
            f"content-length: {len(self.body)}\r\n{self.authorization}\r\n"
        )
        self._writer.write(head.encode() + self.body)
        response = await read_head(reader)
        self.seen.status = int(response.words[1])
        self.seen.headers = response.headers
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            await self._read_events(reader, response)
        else:
            await self._read_answer(reader, response)

    async def _read_answer(self, reader: asyncio.StreamReader, head: Head) -> None:
        body = b"".join([part async for part in read_body(reader, head)])
        try:
            self._note(json.loads(body))
        except ValueError:
            self.seen.malformed.append(body.decode(errors="replace")[:80])

    async def _read_events(self, reader: asyncio.StreamReader, head: Head) -> None:
        async for data in _events(read_body(reader, head)):
            if data == "[DONE]":
                self.seen.has_done = True
                continue
            try:
                self._note(json.loads(data))
            except ValueError:
                self.seen.malformed.append(data[:80])

    def _note(self, record: Json) -> None:
        """Notes the facts of an event or of a whole response."""
        seen = self.seen
        if not isinstance(record, dict):
            seen.malformed.append(repr(record)[:80])
            return
        if record.get("error"):
            error = record["error"]
            seen.error = error if isinstance(error, dict) else {"message": str(error)}
        elif (seen.status or 0) >= 400:
            seen.error = record
        elif "choices" not in record:
            seen.unknown += 1
        if (model := record.get("model")) and model not in seen.models:
            seen.models.append(model)
        seen.usage = record.get("usage") or seen.usage
        for choice in record.get("choices") or []:
            message = choice.get("delta") or choice.get("message") or choice
            text = message.get("text") or message.get("content") or ""
            seen.finish_reason = choice.get("finish_reason") or seen.finish_reason
            seen.text += text
            if text or choice.get("finish_reason"):
                seen.last_text = time.monotonic()
            if text:
                self.has_text.set()


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yields the data of server-sent events."""
    buffer = b""
    is_first = True
    async for part in parts:
        # The format allows a byte order mark at the start.
        part = part.removeprefix("\ufeff".encode()) if is_first else part
        is_first = False
        buffer += part.replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            lines = event.decode(errors="replace").split("\n")
            data = [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]
            if data:
                yield "\n".join(data)
