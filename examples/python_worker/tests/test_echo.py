"""The echo runner's tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tokenway_worker import ChatMessage, Invalid, Options, Request, Token
from tokenway_worker.echo import END_OF_SEQUENCE, EchoRunner


class Never:
    """A `Cancelled` that is never cancelled."""

    def __call__(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        return False


def run(text: str, max_tokens: int, **fields: Any) -> tuple[bytes, bool]:
    """Returns all bytes, and true if the sequence ended before `max_tokens`."""
    runner = EchoRunner(Options())
    prompt = tuple(runner.tokenize(text, True))
    request = Request(prompt=prompt, max_tokens=max_tokens, **fields)
    runner.check(request)
    tokens: list[Token] = []
    last = runner.generate(request, tokens.append, Never())
    return b"".join(it.data for it in [*tokens, *filter(None, [last])]), last is not None


def test_the_prompt_is_echoed_and_then_ends() -> None:
    assert run("naïve", 100) == ("naïve".encode(), True)
    assert run("naïve", 3) == (b"na\xc3", False)


def test_a_resumed_sequence_continues_exactly() -> None:
    whole, _ = run("naïve", 100)
    for place in range(len(whole) + 1):
        assert run("naïve", 100, delivered=tuple(whole[:place])) == (whole[place:], True)


def test_stop_tokens_min_tokens_and_ignore_eos_are_honoured() -> None:
    assert run("1232", 100, stop_token_ids=frozenset(b"2")) == (b"12", True)
    assert run("1232", 100, stop_token_ids=frozenset(b"2"), min_tokens=2) == (b"1232", True)
    assert run("ab", 100, min_tokens=5) == (b"ababa", True)
    assert run("ab", 5, ignore_eos=True) == (b"ababa", False)


def test_an_eos_token_in_the_prompt_is_rejected() -> None:
    with pytest.raises(Invalid):
        EchoRunner(Options()).check(Request(prompt=(END_OF_SEQUENCE,), max_tokens=1))


def test_bytes_are_tokens() -> None:
    runner = EchoRunner(Options())
    assert list(runner.tokenize("é", False)) == [0xC3, 0xA9]
    assert runner.detokenize([0xC3, 0xA9, END_OF_SEQUENCE]) == [b"\xc3", b"\xa9", b""]
    assert runner.render_chat([ChatMessage("user", "Hi")]) == "user: Hi\n"
