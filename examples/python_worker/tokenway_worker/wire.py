"""The messages of `worker.proto`, and what they say in this package's terms.

The contract is compiled as the worker starts, into memory: no generated code can be older than it,
two workers that start at once do not write the same file, and nothing but this module handles
messages that the type checker does not know. It must not know runners or streams.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

from .failures import Failure
from .runner import ChatMessage, Logprobs, ModelFacts, Request, Sampling, Token

PROTOCOL_VERSION = 1
PACKAGE = "tokenway.worker.v1"
METHOD = f"/{PACKAGE}.DeviceWorker/Attach"
# The most bytes of one message, in both directions.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

PROTO = "tokenway/worker/v1/worker.proto"
# Where the contract lies, for a package that was taken out of Tokenway's tree.
PROTO_FOLDER = "TOKENWAY_PROTO_FOLDER"


class ContractError(Exception):
    """The contract cannot be read, and what to do about it."""


@cache
def message_class(name: str) -> type[Message]:
    """The class of a message of the contract. Raises `ContractError`."""
    return GetMessageClass(_contract().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _contract() -> DescriptorPool:
    in_tree = Path(__file__).resolve().parents[3] / "proto"
    folder = Path(os.environ.get(PROTO_FOLDER) or in_tree)
    if not (folder / PROTO).is_file():
        raise ContractError(
            f"{folder / PROTO} is not there: set {PROTO_FOLDER} to Tokenway's folder `proto`"
        )
    with tempfile.TemporaryDirectory() as work:
        compiled = Path(work) / "worker.binpb"
        code = protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={compiled}", PROTO])
        if code != 0:
            raise ContractError(f"{folder / PROTO} cannot be compiled; protoc says why above")
        files = FileDescriptorSet.FromString(compiled.read_bytes())
    # A pool of its own: in the default one, another copy of the contract would be in the way.
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


# What the engine says.


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker is taken."""

    heartbeat_interval_s: float


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence to run."""

    sequence: int
    # Of which `ready`.
    life: int
    credit: int
    request: Request


@dataclass(frozen=True, slots=True)
class Credit:
    """Sequences, and how many more tokens each may emit."""

    grants: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Sequences that nobody waits for any more."""

    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Asks for the ids of a text."""

    text: str
    begins: bool


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Asks for the bytes of ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderChat:
    """Asks for a conversation as text."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class Infill:
    """Asks for the prompt that fills a gap."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question to the tokenizer or the template. None: about something newer than this worker."""

    number: int
    about: Tokenize | Detokenize | RenderChat | Infill | None


@dataclass(frozen=True, slots=True)
class Drain:
    """No further sequence comes."""


Heard = Welcome | Submit | Credit | Cancel | Question | Drain


def heard(response: Any) -> Heard | None:
    """What the engine says. None: something newer than this worker, which passes it over."""
    kind = response.WhichOneof("message")
    said: Any = getattr(response, kind) if kind else None
    match kind:
        case "welcome":
            return Welcome(max(said.heartbeat_interval_ms, 1) / 1000)
        case "submit":
            return Submit(said.sequence, said.life, said.credit, _request(said))
        case "credit":
            return Credit(tuple((grant.sequence, grant.tokens) for grant in said.grants))
        case "cancel":
            return Cancel(tuple(said.sequences))
        case "question":
            return Question(said.question, _about(said))
        case "drain":
            return Drain()
    return None


def _request(submit: Any) -> Request:
    sampling = submit.sampling
    return Request(
        prompt=tuple(submit.prompt),
        max_tokens=submit.max_tokens,
        delivered=tuple(submit.delivered),
        sampling=Sampling(
            seed=sampling.seed,
            choice=sampling.choice,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            # 0 cannot be asked for: where it is left out, there is none.
            repetition_penalty=sampling.repetition_penalty or 1.0,
            logit_bias=dict(sampling.logit_bias),
        ),
        stop_token_ids=frozenset(submit.stop_token_ids),
        ignore_eos=submit.ignore_eos,
        min_tokens=submit.min_tokens,
        logprobs=submit.logprobs if submit.HasField("logprobs") else None,
        scores_prompt=submit.scores_prompt,
        stamps=submit.stamps,
        user=submit.user,
    )


def _about(question: Any) -> Tokenize | Detokenize | RenderChat | Infill | None:
    kind = question.WhichOneof("about")
    asked: Any = getattr(question, kind) if kind else None
    match kind:
        case "tokenize":
            return Tokenize(asked.text, asked.begins)
        case "detokenize":
            return Detokenize(tuple(asked.ids))
        case "render_chat":
            turns = asked.messages
            return RenderChat(tuple(ChatMessage(it.role, it.content, it.name) for it in turns))
        case "infill":
            return Infill(asked.prefix, asked.suffix)
    return None


# What the worker says.


class End(IntEnum):
    """How a sequence ended."""

    GOES_ON = 0
    STOP = 1
    LENGTH = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """What a step made of one sequence."""

    sequence: int
    first_index: int
    tokens: Listing[Token]
    # When each was emitted; empty where nobody asked.
    emitted_ns: Listing[int]
    is_prompt: bool
    end: End
    failure: Failure | None


def hello(model: str, name: str, child_token: str, heartbeat_timeout_s: float = 0.0) -> Message:
    """Who this is, and for how long it may send nothing; 0 is as long as the engine says."""
    said = {
        "protocol_version": PROTOCOL_VERSION,
        "model": model,
        "name": name,
        "child_token": child_token,
        "heartbeat_timeout_ms": round(heartbeat_timeout_s * 1000),
    }
    return _say(hello=said)


def loading(fraction: float) -> Message:
    """How far the model is loaded."""
    return _say(loading={"fraction": min(max(fraction, 0.0), 1.0)})


def ready(model: ModelFacts, slots: int, life: int) -> Message:
    """What this worker serves, from now on; `life` counts how often on this stream."""
    said = {
        "runner": model.runner,
        "context_length": model.context_length,
        "max_prompt_bytes": model.max_prompt_bytes,
        "vocabulary_size": model.vocabulary_size,
        "resumption": int(model.resumption),
        "unsupported": model.unsupported,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
    }
    return _say(ready={"model": said, "slots": slots, "life": life})


def accepted(sequence: int) -> Message:
    """A sequence has its slot."""
    return _say(accepted={"sequence": sequence})


def refused(sequence: int, failure: Failure) -> Message:
    """A sequence is not run."""
    return _say(refused={"sequence": sequence, "failure": _failure(failure)})


def step(sequences: Listing[SequenceStep]) -> Message:
    """What was ready together."""
    return _say(step={"sequences": [_sequence_step(it) for it in sequences]})


def heartbeat(step_ms: int) -> Message:
    """The worker lives."""
    return _say(heartbeat={"step_ms": min(step_ms, 0xFFFF_FFFF)})


def crashed(reason: str) -> Message:
    """The device failed."""
    return _say(crashed={"reason": _up_to_1_kib(reason)})


def load_failed(reason: str) -> Message:
    """The model cannot be loaded."""
    return _say(load_failed={"reason": _up_to_1_kib(reason)})


def answer_ids(question: int, ids: Listing[int]) -> Message:
    """The ids that were asked for."""
    return _say(answer={"question": question, "ids": {"ids": ids}})


def answer_pieces(question: int, pieces: Listing[bytes]) -> Message:
    """The tokens' bytes that were asked for."""
    said = {"bytes": b"".join(pieces), "lengths": [len(piece) for piece in pieces]}
    return _say(answer={"question": question, "pieces": said})


def answer_text(question: int, text: str) -> Message:
    """The text that was asked for."""
    return _say(answer={"question": question, "text": text})


def answer_failure(question: int, failure: Failure) -> Message:
    """Why there is no answer."""
    return _say(answer={"question": question, "failure": _failure(failure)})


def is_loading(message: Any) -> bool:
    """Whether it only says how far the model is loaded."""
    return bool(message.WhichOneof("message") == "loading")


def _say(**message: Any) -> Message:
    return message_class("AttachRequest")(**message)


def _sequence_step(it: SequenceStep) -> dict[str, Any]:
    said: dict[str, Any] = {
        "sequence": it.sequence,
        "first_index": it.first_index,
        "ids": [token.id for token in it.tokens],
        "bytes": b"".join(token.data for token in it.tokens),
        "lengths": [len(token.data) for token in it.tokens],
        "is_prompt": it.is_prompt,
        "emitted_ns": it.emitted_ns,
        "end": int(it.end),
    }
    # The lists are as long as the ids or empty, so one token without a time leaves out all times.
    if it.emitted_ns and all(token.due_ns for token in it.tokens):
        said["due_ns"] = [token.due_ns for token in it.tokens]
    logprobs = [token.logprobs for token in it.tokens if token.logprobs is not None]
    if len(logprobs) == len(it.tokens):
        said["logprobs"] = [_logprobs(one) for one in logprobs]
    if it.failure is not None:
        said["failure"] = _failure(it.failure)
    return said


def _logprobs(it: Logprobs) -> dict[str, Any]:
    said: dict[str, Any] = {"token_bytes": it.token_bytes}
    if it.logprob is not None:
        said["logprob"] = _bounded(it.logprob)
    said["top"] = [
        {"id": top.id, "token_bytes": top.token_bytes, "logprob": _bounded(top.logprob)} for top in it.top
    ]
    return said


def _bounded(logprob: float) -> float:
    """The contract knows no minus infinity."""
    return max(logprob, -9999.0)


def _failure(failure: Failure) -> dict[str, Any]:
    return {"is_invalid": failure.is_invalid, "message": _up_to_1_kib(failure.message)}


def _up_to_1_kib(text: str) -> str:
    return text.encode(errors="replace")[:1024].decode(errors="ignore")
