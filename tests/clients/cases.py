"""Runs one case of a file of cases: `python FILE CASE ADDRESS`. A case that returns has passed."""

import sys
from collections.abc import Callable

Case = Callable[[str], None]


def run(*cases: Case) -> int:
    name, address = sys.argv[1:]
    by_name = {case.__name__: case for case in cases}
    by_name[name](address)
    return 0


def tokens(count: int) -> list[str]:
    """The first tokens of the test runner."""
    return [f"token_{index}" for index in range(count)]
