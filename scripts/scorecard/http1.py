"""The part of HTTP/1.1 that the engine and the client share: heads and bodies, without libraries.

A library would hide how a response ends, and that is the fact to observe.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

MAX_HEAD = 1 << 20


class UncleanEnd(Exception):
    """The connection ended before the end of the message."""


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a request or response. Names of headers are lower case."""

    first_line: str
    headers: dict[str, str]

    @property
    def words(self) -> list[str]:
        return self.first_line.split(" ")


async def read_head(reader: asyncio.StreamReader) -> Head:
    """Reads a head.

    Raises:
        UncleanEnd: the connection ended first.
    """
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, OSError) as error:
        raise UncleanEnd("the connection ended before the end of the head") from error
    first_line, *lines = raw.decode("latin-1").strip().split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Head(first_line, headers)


async def read_body(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
    """Yields the body's parts as they arrive.

    Raises:
        UncleanEnd: the connection ended before the end of the body.
    """
    try:
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            async for part in _chunks(reader):
                yield part
        elif "content-length" in head.headers:
            length = int(head.headers["content-length"])
            while length > 0:
                part = await reader.read(min(length, 65536))
                if not part:
                    raise UncleanEnd("the body is shorter than its content-length")
                length -= len(part)
                yield part
        elif head.first_line.startswith("HTTP/"):
            while part := await reader.read(65536):
                yield part
    except (asyncio.IncompleteReadError, OSError) as error:
        raise UncleanEnd(f"the connection broke in the body ({type(error).__name__})") from error


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]
