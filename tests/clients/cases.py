"""Runs cases of a client file: `python FILE CASE ADDRESS [CASE ADDRESS …]`. A case passes if it returns."""

import sys
from collections.abc import Callable

Case = Callable[[str], None]


def run(*cases: Case) -> int:
    by_name = {case.__name__: case for case in cases}
    for name, address in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        by_name[name](address)
    return 0


def tokens(count: int) -> list[str]:
    """The first tokens of the test runner."""
    return [f"token_{index}" for index in range(count)]


def reading() -> None:
    """Tells the test that a stream is being read. The test then sends its signal to the server."""
    print("reading", flush=True)
