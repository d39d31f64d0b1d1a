"""A GGUF model on llama.cpp, by the PyPI package `xllamacpp`.

Each token is one request to llama.cpp's server, which keeps what its slot has read and so decodes
one token for it. That costs about a tenth (1.5 s instead of 1.4 s for 100 tokens of SmolLM2-135M
on one core), and gives what its streams cannot: the id of every token (a stream leaves out those
inside an unfinished character), a seed for each position, a device that stands still where there
is no credit, and a cancellation that is heard before the next token.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .runner import (
    MAX_PROMPT_BYTES,
    Cancelled,
    ChatMessage,
    DeviceLost,
    Emit,
    Ended,
    Failed,
    Invalid,
    LoadError,
    ModelFacts,
    Options,
    Request,
    Resumption,
    Runner,
    Sampling,
    Token,
)

# How much of a prompt is read at once: 0.4 s on one slow core, after which a cancellation is heard
# and the others' tokens have their turn. A GPU reads ten times as much in no more time.
STEP_TOKENS = 64

# The order in which Tokenway's own llama.cpp runner samples. Bias comes before these, the draw
# after.
SAMPLERS = ["penalties", "temperature", "top_k", "top_p", "min_p"]

# Not `logprobs`, `echo` and `suffix`: the server tells no log probabilities of a token inside an
# unfinished character, none of a prompt's tokens, and fills gaps with no prompt that could be told.
HONOURS = (
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
)

SERVER = Path(__file__).with_name("llama_server.py")

# How long the server may take to end by itself.
FAREWELL_S = 5.0


class XllamacppRunner(Runner):
    """One GGUF model, as many sequences at once as it has slots."""

    def __init__(self, options: Options) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise LoadError("xllamacpp is not installed: pip install xllamacpp")
        if options.model_path is None:
            raise LoadError("--model-path must name a GGUF file")
        if not options.model_path.is_file():
            raise LoadError(f"--model-path: {options.model_path} is not a file")
        self.slots = options.slots
        self._options = options
        self._server: _Server | None = None
        self._pieces: list[bytes] = []
        self._bos: int | None = None

    @property
    def _llama(self) -> _Server:
        if self._server is None:
            raise DeviceLost("llama.cpp's server is not there")
        return self._server

    def load(self, progress: Callable[[float], None]) -> None:
        self.close()
        progress(0.0)
        self._server = server = _Server(self._options)
        server.await_model()
        props = server.get("/props")
        bos_token, eos_token = props["bos_token"], props["eos_token"]
        # What begins every text, where the model says that something does.
        begun = server.post("/tokenize", {"content": "", "add_special": True})["tokens"]
        named = self._ids(bos_token)
        self._bos = named[0] if begun[:1] == named[:1] and named else None
        vocabulary_size = server.get("/v1/models")["data"][0]["meta"]["n_vocab"]
        self._pieces = self._read_pieces(vocabulary_size)
        context_length = props["default_generation_settings"]["n_ctx"]
        longest = max(map(len, self._pieces))
        self.model = ModelFacts(
            runner="xllamacpp",
            context_length=context_length,
            vocabulary_size=vocabulary_size,
            # No prompt that fits the context is longer than this.
            max_prompt_bytes=min(context_length * longest, MAX_PROMPT_BYTES),
            # Delivered tokens are read as a prompt is, by other kernels than those that made them:
            # what follows is almost always the same, and nobody has proved that it always is.
            resumption=Resumption.CONTIGUOUS,
            honours=HONOURS,
            bos_token=bos_token if self._bos is not None else "",
            eos_token=eos_token,
        )
        progress(1.0)

    def generate(self, request: Request, emit: Emit, cancelled: Cancelled) -> Token | None:
        ids = [*request.prompt, *request.delivered]
        made = Counter(request.delivered)
        has_read = self._prefill(request.slot, ids, cancelled)
        for position in range(len(request.delivered), request.max_tokens):
            if cancelled():
                raise Ended
            said = self._complete(
                request.slot,
                ids,
                has_read,
                n_predict=1,
                ignore_eos=position < request.min_tokens and not request.ignore_eos,
                logit_bias=bias(request, made, position),
                **sampling_fields(request.sampling, position, len(ids)),
            )
            [id] = said["tokens"]
            token = Token(id, self._pieces[id])
            if request.is_end(id, is_eos=said["stop_type"] == "eos"):
                return token
            emit(token)
            ids.append(id)
            made[id] += 1
            has_read = True
        return None

    def tokenize(self, text: str, begins: bool) -> Sequence[int]:
        ids = self._ids(text)
        if begins and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def detokenize(self, ids: Sequence[int]) -> Sequence[bytes]:
        return [self._pieces[id] for id in ids]

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        turns = []
        for message in messages:
            turn = {"role": message.role, "content": message.content}
            turns.append({**turn, "name": message.name} if message.name else turn)
        rendered: str = self._llama.post("/apply-template", {"messages": turns})["prompt"]
        return rendered

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _prefill(self, slot: int, ids: list[int], cancelled: Cancelled) -> bool:
        """Reads all but the end of a prompt, a portion at a time; whether it has read any.

        The first portion reads nothing of what the slot holds: the same prompt is always read in
        the same portions, so it has the same tokens whatever ran there before.
        """
        has_read = False
        for end in range(STEP_TOKENS, len(ids), STEP_TOKENS):
            if cancelled():
                raise Ended
            self._complete(slot, ids[:end], has_read, n_predict=0, temperature=0.0)
            has_read = True
        return has_read

    def _complete(self, slot: int, ids: list[int], has_read: bool, **fields: Any) -> dict[str, Any]:
        """Lets a slot read these ids, of which `has_read` says that it holds the beginning."""
        asked = {
            "prompt": ids,
            "id_slot": slot,
            "cache_prompt": has_read,
            "return_tokens": True,
            "response_fields": ["tokens", "stop_type", "completion_probabilities"],
            **fields,
        }
        try:
            return self._llama.post("/completion", asked)
        except Invalid as error:
            # The request has been checked: what is wrong now is not its client's fault.
            raise Failed(str(error)) from error

    def _ids(self, text: str) -> list[int]:
        asked = {"content": text, "add_special": False, "parse_special": True}
        ids: list[int] = self._llama.post("/tokenize", asked)["tokens"]
        return ids

    def _read_pieces(self, vocabulary_size: int) -> list[bytes]:
        """The bytes of every token.

        Text would not do: a token may be a part of a character, of which text has only replacement
        characters. The probabilities of a next token come with the bytes of each, as llama.cpp
        itself shows it, so all of them at once are the vocabulary, whatever kind of tokenizer it
        has. Special tokens have none: they are never shown.
        """
        # The token that comes must be a whole character, or nothing is told: this one is.
        whole = self._ids("a")[-1]
        said = self._complete(
            0,
            [whole],
            False,
            n_predict=1,
            n_probs=vocabulary_size,
            temperature=0.0,
            logit_bias=[[whole, 1000.0]],
        )
        pieces = [b""] * vocabulary_size
        for token in said["completion_probabilities"][0]["top_logprobs"]:
            pieces[token["id"]] = bytes(token["bytes"])
        return pieces


def sampling_fields(sampling: Sampling, position: int, length: int) -> dict[str, Any]:
    """How llama.cpp is to choose the token at this position, behind so many of prompt and
    completion."""
    return {
        "samplers": SAMPLERS,
        "seed": draw_seed(sampling.seed, sampling.choice, position),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        # All of prompt and completion.
        "repeat_last_n": length,
    }


def draw_seed(seed: int, choice: int, position: int) -> int:
    """What seeds one draw: it depends on nothing but the request's seed, the choice and the
    position.

    31 bits: the largest number of 32 would let llama.cpp draw a seed of its own.
    """
    key = struct.pack("<QII", seed, choice, position)
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


def bias(request: Request, made: Counter[int], position: int) -> list[list[Any]]:
    """What is added to logits: the request's bias, and the penalties that count the completion
    only.

    llama.cpp's own count the prompt, too. Both are sums, so a bias does the same, except together
    with a repetition penalty, which then divides what they have left.
    """
    sampling = request.sampling
    added: dict[int, float | bool] = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for id, count in made.items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            added[id] = added.get(id, 0.0) - penalty
    if position < request.min_tokens:
        # False is minus infinity. The model's own ends are `ignore_eos`.
        added.update((id, False) for id in request.stop_token_ids)
    return [[id, amount] for id, amount in added.items()]


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class _Server:
    """The process in which llama.cpp's server runs (`llama_server`), and what can be asked of
    it."""

    def __init__(self, options: Options) -> None:
        said = {
            "model": str(options.model_path),
            "slots": options.slots,
            "threads": options.threads,
            "context_length": options.context_length,
            "step_tokens": STEP_TOKENS,
            "device": options.device,
        }
        self._life, its_end = socket.socketpair()
        with its_end:
            self._process = subprocess.Popen(
                # By its path: it needs nothing of this package, wherever that was found.
                [sys.executable, "-P", str(SERVER), json.dumps(said)],
                stdin=its_end.fileno(),
                # A Ctrl-C is for the worker, which ends this process itself.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._path = ""

    def await_model(self) -> None:
        """Returns when the model is loaded. Raises `LoadError`."""
        self._path = self._life.recv(4096).decode()
        if not self._path:
            code = self._process.wait()
            raise LoadError(f"llama.cpp ended with exit code {code}; it says why above")

    def get(self, route: str) -> dict[str, Any]:
        """What a route says. Raises `DeviceLost` where nobody answers."""
        return self._ask("GET", route, None)

    def post(self, route: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What a route says to this. Raises `Invalid` and `Failed`, as the server tells whose
        fault it is, and `DeviceLost` where nobody answers."""
        return self._ask("POST", route, json.dumps(asked))

    def close(self) -> None:
        """Ends the process."""
        # Not only closed: a thread that waits for the model still holds it open.
        with contextlib.suppress(OSError):
            self._life.shutdown(socket.SHUT_RDWR)
        self._life.close()
        try:
            self._process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, route: str, body: str | None) -> dict[str, Any]:
        # A connection for each: over a Unix socket that is less work than to find out whether the
        # server still holds an old one.
        connection = _Connection(self._path)
        try:
            connection.request(method, route, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise DeviceLost(f"llama.cpp does not answer: {type(error).__name__}") from error
        finally:
            connection.close()
        if response.status == http.HTTPStatus.OK:
            return said
        message = said.get("error", {}).get("message", "no reason")
        if response.status == http.HTTPStatus.BAD_REQUEST:
            raise Invalid(message)
        raise Failed(message)
