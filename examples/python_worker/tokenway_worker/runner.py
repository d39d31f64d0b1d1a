"""The runner interface: the class to implement, its arguments and its exceptions.

A runner knows tokens and its device, but no streams, credit or engine: `emit` blocks while there is
no credit and raises when no more tokens are needed.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# Parameters that a runner may not support: all names listed at `Model.unsupported` in
# `worker.proto`.
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

# Default limit for prompt texts. Even with one token per byte, the ids of such a text fit into a 4
# MiB message (an id below two million takes up to three bytes).
MAX_PROMPT_BYTES = 1024 * 1024


class Runner(ABC):
    """Runs one model on one device.

    `load` is called first. Then `generate` is called on one thread per slot, and concurrently
    `tokenize`, `detokenize`, `render_chat` and `infill` on other threads.

    All threads share the GIL. A library that holds it during a long call stops the heartbeats: run
    it in a separate process, as the `xllamacpp` runner does.
    """

    # Facts about the model. Must be set when `load` returns.
    model: ModelFacts
    # Number of sequences that run at once, 1 to 65,536. Must be set before `load`.
    slots: int

    def load(self, progress: Callable[[float], None]) -> None:  # noqa: B027
        """Loads the model and reports progress from 0 to 1. Called again after `DeviceLost`.

        Raises `LoadError` with a message for the operator.
        """

    def check(self, request: Request) -> None:  # noqa: B027
        """Raises `Invalid` for a request that this runner rejects, before `generate`.

        Vocabulary and context length have already been checked.
        """

    @abstractmethod
    def generate(self, request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        """Generates the tokens after `request.delivered` and emits each at once.

        `emit` returns when there is credit for another token. It raises `Ended` when the sequence
        was cancelled or has `max_tokens`. Do not catch it.

        Returns the token that ended the sequence, eos or a stop token (`Request.is_end`), which is
        sent as the last token. The last of `max_tokens` may also be returned.

        If a token violates the protocol (`rules`), the sequence fails and `emit` raises `Ended`.

        Raises `Invalid` if the request is at fault, `Failed` if this sequence cannot continue, and
        `DeviceLost` if no sequence can. Any other exception counts as `Failed`.
        """

    @abstractmethod
    def tokenize(self, text: str, begins: bool) -> Sequence[int]:
        """The token ids of a text. If `begins` is true, the bos token comes first, unless the text
        already starts with it.

        This and the other tokenizer methods may raise the same exceptions as `generate`.
        """

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> Sequence[bytes]:
        """The bytes of each token. Empty for tokens that are never shown."""

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """Renders a chat with the model's template, up to the start of the model's reply."""
        raise Invalid("This model has no chat template.")

    def infill(self, prefix: str, suffix: str) -> Sequence[int]:
        """The fill-in-the-middle prompt. Called only if `suffix` is supported."""
        raise Invalid("This model has no fill-in-the-middle tokens.")

    def close(self) -> None:  # noqa: B027
        """Releases the resources of `load`. Called before the worker exits."""


class Emit(Protocol):
    """Sends a token."""

    def __call__(self, token: Token, /) -> None:
        """Sends a token at once and returns when there is credit for another.

        Raises `Ended` when the sequence has ended.
        """


class Cancelled(Protocol):
    """Reports whether the sequence has been cancelled."""

    def __call__(self) -> bool:
        """True if the sequence is cancelled. Call it between two device calls: it is cheap and
        shows the engine that the last call has returned."""

    def wait(self, seconds: float) -> bool:
        """Sleeps until cancelled, at most this long. Returns true if cancelled. The time does not
        count as a device call."""


class Resumption(enum.IntEnum):
    """Quality of resuming a sequence from its prompt and its delivered tokens."""

    # The tokens are those of an undisturbed run.
    EXACT = 1
    # No token is lost or repeated, but the following tokens may differ.
    CONTIGUOUS = 2
    # The sequence cannot be resumed.
    NO = 3


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model. All workers of a model must report the same."""

    # Kind of the runner, up to 64 printable ASCII characters.
    runner: str
    # Maximum number of tokens of a sequence, prompt and completion.
    context_length: int
    # Number of tokens. Ids are below it.
    vocabulary_size: int
    # Maximum length of a text to tokenize, in bytes.
    max_prompt_bytes: int = MAX_PROMPT_BYTES
    resumption: Resumption = Resumption.CONTIGUOUS
    # Supported names of `ALL_PARAMETERS`. The engine rejects requests that need any other.
    honours: tuple[str, ...] = ()
    # Text of the bos and eos tokens. Empty if there is none.
    bos_token: str = ""
    eos_token: str = ""

    def __post_init__(self) -> None:
        for name in self.honours:
            if name not in ALL_PARAMETERS:
                known = ", ".join(ALL_PARAMETERS)
                raise ValueError(f"ModelFacts.honours names {name!r}, which is none of {known}")

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Names of `ALL_PARAMETERS` that are not supported."""
        return tuple(name for name in ALL_PARAMETERS if name not in self.honours)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Random numbers must depend only on `seed`, `choice` and the token's
    position, so that a resumed sequence samples the same tokens on any worker."""

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
    """A sequence to run. `repr` hides its tokens and `user`, so that they are not logged."""

    prompt: tuple[int, ...] = field(repr=False)
    # Maximum number of tokens, including delivered ones. 0 only with `scores_prompt`.
    max_tokens: int
    # Tokens that the client already has. Penalties count them as output.
    delivered: tuple[int, ...] = field(default=(), repr=False)
    sampling: Sampling = field(default=Sampling(), repr=False)
    stop_token_ids: frozenset[int] = frozenset()
    # True if eos tokens do not end the sequence.
    ignore_eos: bool = False
    # Before this many tokens, the sampler must not choose eos or stop tokens.
    min_tokens: int = 0
    # Number of top logprobs to report per token. None: no logprobs.
    logprobs: int | None = None
    # Emit the prompt's tokens first (`Token.is_prompt`), each with its logprobs.
    scores_prompt: bool = False
    # True if tokens need timestamps.
    stamps: bool = False
    # Id of the request, for log lines.
    request_id: str = ""
    user: str = field(default="", repr=False)
    # Slot of the sequence, from 0. No other sequence uses it.
    slot: int = 0

    def is_end(self, token: int, is_eos: bool) -> bool:
        """True if this token ends the sequence. `is_eos` is true for the model's eos tokens."""
        return (is_eos and not self.ignore_eos) or token in self.stop_token_ids


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token."""

    id: int
    # Bytes of the token, possibly part of a character. Empty for tokens that are never shown.
    data: bytes
    # Time at which it was due (`time.monotonic_ns`). 0 if the runner has no schedule.
    due_ns: int = 0
    logprobs: Logprobs | None = None
    # True for a token of the prompt (`Request.scores_prompt`).
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most likely tokens at a position."""

    id: int
    # Bytes that name the token, also if it is never shown.
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs at one position, from the logits before bias, penalties and temperature."""

    # None for the first token of a prompt.
    logprob: float | None
    token_bytes: bytes
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    content: str
    # Distinguishes participants of the same role. Empty if not given.
    name: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """Command-line options. A runner's constructor takes them as its only argument."""

    model_path: Path | None = None
    slots: int = 4
    threads: int = 1
    context_length: int = 2048
    interval_s: float = 0.0
    device: int | None = None


class Ended(Exception):
    """The sequence has ended. Not an error: do not catch it in `generate`."""


class Invalid(Exception):
    """The request is at fault. The client gets the message."""


class Failed(Exception):
    """This sequence cannot continue, but others can. The client does not get the message."""


class DeviceLost(Exception):
    """The device and all its sequences have failed. The model is reloaded."""


class LoadError(Exception):
    """The model cannot be loaded. The message says why."""
