"""The seam: what a runner is, what it is given, and what it may raise.

A runner knows tokens and its device. It knows no stream, no credit and no engine: `emit` waits
where it must, and raises where nobody wants more.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# What a request may ask for and a runner may be unable to do: all that `worker.proto` names at
# `Model.unsupported`.
ALL_PARAMETERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "logprobs",
    "echo",
    "suffix",
)

# The longest text that a runner should take. Messages are at most 4 MiB, and an id takes up to
# three bytes below two million: however small its tokens, the ids of such a text fit.
MAX_PROMPT_BYTES = 1024 * 1024


class Runner(ABC):
    """What runs one model on one device.

    `load` comes first. Then `generate` is called on one thread for each slot, and `tokenize`,
    `detokenize`, `render_chat` and `infill` meanwhile on others.

    All threads share Python's interpreter lock. A library that holds it throughout a long call
    would silence the heartbeat: call it in a process of its own, as the `xllamacpp` runner does.
    """

    # What the model is and can. It must be known once `load` has returned.
    model: ModelFacts
    # How many sequences run at once, 1 to 65,536. It must be known before `load`.
    slots: int

    def load(self, progress: Callable[[float], None]) -> None:  # noqa: B027
        """Loads the model, and tells how far it is, from 0 to 1. Runs again after a `DeviceLost`.

        Raises `LoadError`, so that an operator can mend it.
        """

    def check(self, request: Request) -> None:  # noqa: B027
        """Raises `Invalid` for a request that this runner does not take, before it begins.

        What every model asks (ids of the vocabulary, a prompt that fits) has been checked.
        """

    @abstractmethod
    def generate(self, request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        """Makes a sequence's tokens, behind `request.delivered`, and emits each at once.

        `emit` returns when there is room for another token, and raises `Ended` when nobody wants
        another: the sequence was cancelled, or has `max_tokens`. Let that pass through.

        Returns the token by which the sequence ended, if that is not `max_tokens`: the model's end
        of sequence or a stop token (`Request.is_end`). It is sent as the last. The last of
        `max_tokens` may be returned, too.

        A runner that breaks what the contract asks of a token (`rules`) loses this sequence: it
        ends with a failure that says so, and `emit` raises `Ended`.

        Raises `Invalid` where the request is at fault, `Failed` where this sequence cannot go on,
        and `DeviceLost` where no sequence can. Every other exception counts as `Failed`.
        """

    @abstractmethod
    def tokenize(self, text: str, begins: bool) -> Sequence[int]:
        """The ids of a text. Where it `begins`, the token with which the model begins every prompt
        comes first, unless the text begins with it already.

        This and the other questions may raise what `generate` may.
        """

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> Sequence[bytes]:
        """The bytes of each token: none for one that is never shown."""

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """A conversation as the model's template renders it, up to where the model is to answer."""
        raise Invalid("This model has no chat template.")

    def infill(self, prefix: str, suffix: str) -> Sequence[int]:
        """The prompt that asks to fill a gap. Not asked unless `suffix` is honoured."""
        raise Invalid("This model has no fill-in-the-middle tokens.")

    def close(self) -> None:  # noqa: B027
        """Frees what `load` has taken. The worker ends after it."""


class Emit(Protocol):
    """Hands a token on."""

    def __call__(self, token: Token, /) -> None:
        """Sends it at once, and returns when there is room for another.

        Raises `Ended` when nobody wants another.
        """


class Cancelled(Protocol):
    """Tells a runner that nobody waits for its sequence any more."""

    def __call__(self) -> bool:
        """Whether that is so. Ask between two calls of the device: that costs nothing, and
        tells the engine that the last one has returned."""

    def wait(self, seconds: float) -> bool:
        """Sleeps for so long, or until that is so; and whether it is. No call of the device is
        taken to be under way meanwhile."""


class Resumption(enum.IntEnum):
    """How well a sequence goes on from its prompt and the tokens made so far."""

    # The tokens are those that an undisturbed run would have made.
    EXACT = 1
    # No token is lost or repeated; those that follow may be others.
    CONTIGUOUS = 2
    # It cannot go on.
    NO = 3


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is and can. Every worker of a model must say the same of it."""

    # Which kind of runner serves it, up to 64 printable ASCII characters.
    runner: str
    # The most tokens of one sequence, prompt and completion together.
    context_length: int
    # Every id below this is a token.
    vocabulary_size: int
    # The longest text that it tokenizes, in bytes.
    max_prompt_bytes: int = MAX_PROMPT_BYTES
    resumption: Resumption = Resumption.CONTIGUOUS
    # Those of `ALL_PARAMETERS` that it honours: the engine refuses requests that need another, so
    # none is passed over in silence.
    honours: tuple[str, ...] = ()
    # How the token is spelled that begins every prompt, and that ends the output, if there is one.
    bos_token: str = ""
    eos_token: str = ""

    def __post_init__(self) -> None:
        for name in self.honours:
            if name not in ALL_PARAMETERS:
                known = ", ".join(ALL_PARAMETERS)
                raise ValueError(f"ModelFacts.honours names {name!r}, which is none of {known}")

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Those of `ALL_PARAMETERS` that it does not honour."""
        return tuple(name for name in ALL_PARAMETERS if name not in self.honours)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. What is drawn must depend on `seed`, `choice` and the token's
    position alone, so that a sequence is sampled alike wherever it goes on."""

    seed: int = 0
    choice: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to run. Its text is in no log, nor is its `user`."""

    prompt: tuple[int, ...] = field(repr=False)
    # The most tokens, with those delivered. 0 only with `scores_prompt`.
    max_tokens: int
    # The tokens that its client already has. To penalties they are output like any other.
    delivered: tuple[int, ...] = field(default=(), repr=False)
    sampling: Sampling = field(default=Sampling(), repr=False)
    stop_token_ids: frozenset[int] = frozenset()
    # Whether the model's own end-of-sequence tokens end nothing.
    ignore_eos: bool = False
    # Nothing but `max_tokens` ends it before it has so many tokens: the sampler must not choose
    # what would.
    min_tokens: int = 0
    # Tell log probabilities, and those of so many of the likeliest tokens.
    logprobs: int | None = None
    # Emit the prompt's own tokens first (`Token.is_prompt`), each with its log probabilities.
    scores_prompt: bool = False
    # Whether tokens carry when they were due and emitted.
    stamps: bool = False
    user: str = field(default="", repr=False)
    # In which slot it runs, from 0: no other sequence is there.
    slot: int = 0

    def is_end(self, token: int, is_eos: bool) -> bool:
        """Whether this token ends it. `is_eos`: the model ends its output by it."""
        return (is_eos and not self.ignore_eos) or token in self.stop_token_ids


@dataclass(frozen=True, slots=True)
class Token:
    """A token as a device made it."""

    id: int
    # Its bytes, not always whole characters; none for one that is never shown.
    data: bytes
    # When it was due, in nanoseconds of `time.monotonic_ns`; 0 from a runner that keeps no
    # schedule.
    due_ns: int = 0
    logprobs: Logprobs | None = None
    # Whether it is one of the prompt's, where `Request.scores_prompt` asks for them.
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens of a position."""

    id: int
    # The bytes that name it, also where it is never shown.
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What the model thought of one position, by its logits before bias, penalties and
    temperature."""

    # None for the first token of a prompt, which nothing comes before.
    logprob: float | None
    token_bytes: bytes
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str
    # Tells participants of the same role apart. Empty: nobody.
    name: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says to a runner, which takes it as its only argument."""

    model_path: Path | None = None
    slots: int = 4
    threads: int = 1
    context_length: int = 2048
    interval_s: float = 0.0
    device: int | None = None


class Ended(Exception):
    """Nobody wants another token of this sequence. No error: let it pass through `generate`."""


class Invalid(Exception):
    """The request is at fault. Its client is told the message."""


class Failed(Exception):
    """This sequence cannot go on; the others do. Its client is not told the message."""


class DeviceLost(Exception):
    """The device failed, and all its sequences with it. The model is loaded again."""


class LoadError(Exception):
    """The model cannot be loaded, and why."""
