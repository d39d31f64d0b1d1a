"""Conversion between the messages of `worker.proto` and this package's types.

The proto file is compiled in memory when the worker starts, so there is no generated code that
could be outdated. Only this module handles messages, which the type checker does not know. It must
not know runners or streams.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

from .failures import Failure
from .runner import ChatMessage, Logprobs, ModelFacts, Request, Sampling, Token

PROTOCOL_VERSION = 2
PACKAGE = "tokenway.worker.v1"
METHOD = f"/{PACKAGE}.DeviceWorker/Attach"
# Maximum size of a message in bytes, in both directions.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

PROTO = "tokenway/worker/v1/worker.proto"
# Environment variable with the proto folder, for a package outside Tokenway's repository.
PROTO_FOLDER = "TOKENWAY_PROTO_FOLDER"


class ContractError(Exception):
    """The proto file cannot be read or compiled. The message says what to do."""


@cache
def message_class(name: str) -> type[Message]:
    """The class of a message of `worker.proto`. Raises `ContractError`."""
    return GetMessageClass(_contract().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _contract() -> DescriptorPool:
    in_tree = Path(__file__).resolve().parents[3] / "proto"
    folder = Path(os.environ.get(PROTO_FOLDER) or in_tree)
    if not (folder / PROTO).is_file():
        raise ContractError(
            f"{folder / PROTO} does not exist: set {PROTO_FOLDER} to Tokenway's folder `proto`"
        )
    with tempfile.TemporaryDirectory() as work:
        compiled = Path(work) / "worker.binpb"
        # The imported file is part of the contract: `submit` carries a request of the public API.
        # `google/protobuf/struct.proto` is in the package of the compiler.
        imports = [f"-I{folder}", f"-I{files('grpc_tools') / '_proto'}"]
        options = [*imports, f"--descriptor_set_out={compiled}", "--include_imports"]
        code = protoc.main(["protoc", *options, PROTO])
        if code != 0:
            raise ContractError(f"{folder / PROTO} cannot be compiled (see protoc's output above)")
        described = FileDescriptorSet.FromString(compiled.read_bytes())
    # A separate pool, because the default pool may already hold another copy of the proto file.
    pool = DescriptorPool()
    for file in described.file:
        pool.Add(file)
    return pool


# Messages of the engine.


@dataclass(frozen=True, slots=True)
class Welcome:
    """The engine has accepted the worker."""

    heartbeat_interval_s: float


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence to run."""

    sequence: int
    # Generation of the worker (`ready.generation`).
    generation: int
    credit: int
    request: Request


@dataclass(frozen=True, slots=True)
class Credit:
    """Additional tokens that sequences may emit, as (sequence, tokens)."""

    grants: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Sequences to cancel."""

    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Requests the token ids of a text."""

    text: str
    begins: bool


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Requests the bytes of token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RenderChat:
    """Requests a chat rendered as text."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class Infill:
    """Requests a fill-in-the-middle prompt."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Question:
    """A tokenizer call. `operation` is None if its kind is unknown to this worker."""

    number: int
    operation: Tokenize | Detokenize | RenderChat | Infill | None


@dataclass(frozen=True, slots=True)
class Drain:
    """The engine will submit no further sequence."""


EngineMessage = Welcome | Submit | Credit | Cancel | Question | Drain


def parse(response: Any) -> EngineMessage | None:
    """Parses a message. Returns None if its kind is unknown to this worker, which then ignores
    it."""
    kind = response.WhichOneof("message")
    said: Any = getattr(response, kind) if kind else None
    match kind:
        case "welcome":
            return Welcome(max(said.heartbeat_interval_ms, 1) / 1000)
        case "submit":
            return Submit(said.sequence, said.generation, said.credit, _request(said))
        case "credit":
            return Credit(tuple((grant.sequence, grant.tokens) for grant in said.grants))
        case "cancel":
            return Cancel(tuple(said.sequences))
        case "question":
            return Question(said.question, _operation(said))
        case "drain":
            return Drain()
    return None


def _request(submit: Any) -> Request:
    request = submit.request
    return Request(
        prompt=tuple(request.prompt_token_ids.ids),
        max_tokens=request.max_tokens,
        delivered=tuple(submit.delivered),
        sampling=Sampling(
            # Runners compute with the same 64 bits without a sign.
            seed=request.seed % 2**64,
            choice=submit.choice,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            # 0 is not a valid penalty, so it means that the field is unset.
            repetition_penalty=request.repetition_penalty or 1.0,
            logit_bias=dict(request.logit_bias),
        ),
        stop_token_ids=frozenset(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        scores_prompt=request.echo,
        stamps=request.include_stamps,
        user=request.user,
        request_id=submit.request_id,
    )


def _operation(question: Any) -> Tokenize | Detokenize | RenderChat | Infill | None:
    kind = question.WhichOneof("operation")
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


# Messages of the worker.


class End(IntEnum):
    """End of a sequence."""

    GOES_ON = 0
    STOP = 1
    LENGTH = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """Tokens of one sequence in a step."""

    sequence: int
    first_index: int
    tokens: Listing[Token]
    # Emission times. Empty if timestamps were not requested.
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
    """Loading progress, from 0 to 1."""
    return _say(loading={"fraction": min(max(fraction, 0.0), 1.0)})


def ready(model: ModelFacts, slots: int, generation: int) -> Message:
    """The model that this worker serves. `generation` counts the `ready` messages of this
    stream."""
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
    return _say(ready={"model": said, "slots": slots, "generation": generation})


def accepted(sequence: int) -> Message:
    """A sequence has a slot."""
    return _say(accepted={"sequence": sequence})


def refused(sequence: int, failure: Failure) -> Message:
    """A sequence is rejected."""
    return _say(refused={"sequence": sequence, "failure": _failure(failure)})


def step(sequences: Listing[SequenceStep]) -> Message:
    """Tokens of one or more sequences."""
    return _say(step={"sequences": [_sequence_step(it) for it in sequences]})


def heartbeat(step_ms: int) -> Message:
    """The worker is alive. `step_ms` is the duration of the running device call."""
    return _say(heartbeat={"step_ms": min(step_ms, 0xFFFF_FFFF)})


def crashed(reason: str) -> Message:
    """The device has failed."""
    return _say(crashed={"reason": _up_to_1_kib(reason)})


def load_failed(reason: str) -> Message:
    """The model cannot be loaded."""
    return _say(load_failed={"reason": _up_to_1_kib(reason)})


def answer_ids(question: int, ids: Listing[int]) -> Message:
    """Answers with token ids."""
    return _say(answer={"question": question, "ids": {"ids": ids}})


def answer_pieces(question: int, pieces: Listing[bytes]) -> Message:
    """Answers with the bytes of each token."""
    said = {"bytes": b"".join(pieces), "lengths": [len(piece) for piece in pieces]}
    return _say(answer={"question": question, "pieces": said})


def answer_text(question: int, text: str) -> Message:
    """Answers with a text."""
    return _say(answer={"question": question, "text": text})


def answer_failure(question: int, failure: Failure) -> Message:
    """Answers with a failure."""
    return _say(answer={"question": question, "failure": _failure(failure)})


def is_loading(message: Any) -> bool:
    """True if the message only reports loading progress."""
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
    # A list is as long as the ids or empty, so all times are left out if one token has none.
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
        {"id": top.id, "token_bytes": top.token_bytes, "logprob": _bounded(top.logprob)}
        for top in it.top
    ]
    return said


def _bounded(logprob: float) -> float:
    """Replaces minus infinity, which `worker.proto` does not allow."""
    return max(logprob, -9999.0)


def _failure(failure: Failure) -> dict[str, Any]:
    return {"is_invalid": failure.is_invalid, "message": _up_to_1_kib(failure.message)}


def _up_to_1_kib(text: str) -> str:
    return text.encode(errors="replace")[:1024].decode(errors="ignore")
