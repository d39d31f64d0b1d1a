"""Runners that are scripted by a test."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from tokenway_worker import (
    ALL_PARAMETERS,
    Cancelled,
    ChatMessage,
    Emit,
    Ended,
    Invalid,
    LoadError,
    ModelFacts,
    Request,
    Resumption,
    Runner,
    Token,
)

TIMEOUT_S = 20.0
VOCABULARY = 1000
STOP = 999

Act = Callable[[Request, Emit, Cancelled], Token | None]


def token(id: int) -> Token:
    """A token whose bytes contain its id."""
    return Token(id, b"" if id == STOP else f"<{id}>".encode())


def count(request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
    """Emits the token 100 + index at each index."""
    for index in range(len(request.delivered), request.max_tokens):
        emit(token(100 + index))
    return None


class ScriptedRunner(Runner):
    """Runs `act` for each sequence and records how it ended."""

    def __init__(self, act: Act = count, slots: int = 2) -> None:
        self.slots = slots
        self.act = act
        self.loads = 0
        self.checked: list[tuple[int, ...]] = []
        self.load_error: str | None = None
        # For each ended sequence: its first prompt token, and true if it was ended by `Ended`.
        self.left: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
        self.model = ModelFacts(
            runner="scripted",
            context_length=100,
            vocabulary_size=VOCABULARY,
            max_prompt_bytes=100,
            resumption=Resumption.EXACT,
            honours=tuple(name for name in ALL_PARAMETERS if name != "suffix"),
            bos_token="<s>",
            eos_token="</s>",
        )

    def load(self, progress: Callable[[float], None]) -> None:
        self.loads += 1
        if self.load_error:
            raise LoadError(self.load_error)

    def check(self, request: Request) -> None:
        self.checked.append(request.prompt)
        if request.prompt == (13,):
            raise Invalid("13 is not lucky.")

    def generate(self, request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        try:
            last = self.act(request, emit, cancelled)
        except Ended:
            self.left.put((request.prompt[0], True))
            raise
        except Exception:
            self.left.put((request.prompt[0], False))
            raise
        self.left.put((request.prompt[0], False))
        return last

    def tokenize(self, text: str, begins: bool) -> Sequence[int]:
        if text == "?":
            raise Invalid("A question mark is no text.")
        ids = [ord(character) for character in text]
        return [1, *ids] if begins else ids

    def detokenize(self, ids: Sequence[int]) -> Sequence[bytes]:
        return [token(id).data for id in ids]

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        return "".join(f"{it.role}({it.name}): {it.content}|" for it in messages)


class Gate:
    """Blocks a runner inside a device call until the test opens the gate."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._entered: queue.SimpleQueue[int] = queue.SimpleQueue()

    def enter(self, request: Request) -> None:
        """Called by the runner. Returns when the gate is open."""
        self._entered.put(request.prompt[0])
        self._is_open.wait(TIMEOUT_S)

    def await_entered(self) -> int:
        """Waits until a runner has entered. Returns the first token of its prompt."""
        return self._entered.get(timeout=TIMEOUT_S)

    def open(self) -> None:
        """Lets all runners continue."""
        self._is_open.set()
