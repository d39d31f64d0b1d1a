"""A GGUF model on llama.cpp, with the PyPI package `xllamacpp`.

Each token is one request to llama.cpp's server, which keeps the state of its slot and decodes one
token. This is about 7% slower (1.5 s instead of 1.4 s for 100 tokens of SmolLM2-135M on one core),
but provides what llama.cpp's streams cannot: the id of every token (a stream leaves out those
inside an unfinished character), a seed per position, no computation without credit, and
cancellation before the next token.
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

# Tokens per prefill chunk: 0.4 s on one slow core. Between chunks, cancellation is checked and
# other sequences decode.
STEP_TOKENS = 64

# Sampler order of Tokenway's own llama.cpp runner. The bias comes before these, the random draw
# after.
SAMPLERS = ["penalties", "temperature", "top_k", "top_p", "min_p"]

# Without `logprobs`, `echo` and `suffix`: the server has no logprobs for tokens inside an
# unfinished character or in a prompt, and does not report its fill-in-the-middle prompt.
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

# Time for the server to exit by itself.
FAREWELL_S = 5.0


class XllamacppRunner(Runner):
    """Runs one GGUF model."""

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
            raise DeviceLost("llama.cpp's server is not running")
        return self._server

    def load(self, progress: Callable[[float], None]) -> None:
        self.close()
        progress(0.0)
        self._server = server = _Server(self._options)
        server.await_model()
        props = server.get("/props")
        bos_token, eos_token = props["bos_token"], props["eos_token"]
        # The bos token, if the model adds one.
        initial_ids = server.post("/tokenize", {"content": "", "add_special": True})["tokens"]
        named = self._ids(bos_token)
        self._bos = named[0] if initial_ids[:1] == named[:1] and named else None
        vocabulary_size = server.get("/v1/models")["data"][0]["meta"]["n_vocab"]
        self._pieces = self._read_pieces(vocabulary_size)
        context_length = props["default_generation_settings"]["n_ctx"]
        longest = max(map(len, self._pieces))
        self.model = ModelFacts(
            runner="xllamacpp",
            context_length=context_length,
            vocabulary_size=vocabulary_size,
            # Upper bound for a prompt that fits the context.
            max_prompt_bytes=min(context_length * longest, MAX_PROMPT_BYTES),
            # Delivered tokens are prefilled, by other kernels than those that decoded them. The
            # following tokens are almost always the same, but not guaranteed to be.
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
        """Prefills all but the end of a prompt, in chunks. Returns true if there was any chunk.

        The first chunk does not reuse the slot's state. The same prompt is always split into the
        same chunks, so its tokens do not depend on what ran in the slot before.
        """
        has_read = False
        for end in range(STEP_TOKENS, len(ids), STEP_TOKENS):
            if cancelled():
                raise Ended
            self._complete(slot, ids[:end], has_read, n_predict=0, temperature=0.0)
            has_read = True
        return has_read

    def _complete(self, slot: int, ids: list[int], has_read: bool, **fields: Any) -> dict[str, Any]:
        """Sends a completion request for these ids. `has_read`: reuse the slot's state."""
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
            # The request has already been checked, so this error is not the client's fault.
            raise Failed(str(error)) from error

    def _ids(self, text: str) -> list[int]:
        asked = {"content": text, "add_special": False, "parse_special": True}
        ids: list[int] = self._llama.post("/tokenize", asked)["tokens"]
        return ids

    def _read_pieces(self, vocabulary_size: int) -> list[bytes]:
        """Reads the bytes of every token.

        Detokenizing to text is not enough, because a token may be part of a character. The top
        logprobs of a token have the bytes of each token, so requesting all of them yields the whole
        vocabulary, for any kind of tokenizer. Special tokens have no bytes, because they are never
        shown.
        """
        # The server reports logprobs only if the sampled token is a whole character, so force one.
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
    """llama.cpp's sampling fields for the token at this position, after `length` tokens of prompt
    and completion."""
    return {
        "samplers": SAMPLERS,
        "seed": draw_seed(sampling.seed, sampling.choice, position),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        # The whole prompt and completion.
        "repeat_last_n": length,
    }


def draw_seed(seed: int, choice: int, position: int) -> int:
    """Seed of one draw. It depends only on the request's seed, the choice and the position.

    31 bits, because llama.cpp draws a random seed if it gets the largest 32-bit number.
    """
    key = struct.pack("<QII", seed, choice, position)
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


def bias(request: Request, made: Counter[int], position: int) -> list[list[Any]]:
    """Logit bias: the request's bias and the penalties that count only the completion.

    llama.cpp's presence and frequency penalties also count the prompt. They are sums, so a bias has
    the same effect, except together with a repetition penalty, which then divides the reduced
    logits.
    """
    sampling = request.sampling
    added: dict[int, float | bool] = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for id, count in made.items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            added[id] = added.get(id, 0.0) - penalty
    if position < request.min_tokens:
        # False means minus infinity. Eos tokens are handled by `ignore_eos`.
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
    """Process of llama.cpp's server (`llama_server`) and its HTTP client."""

    def __init__(self, options: Options) -> None:
        said = {
            "model": str(options.model_path),
            "slots": options.slots,
            "threads": options.threads,
            "context_length": options.context_length,
            "step_tokens": STEP_TOKENS,
            "device": options.device,
        }
        self._control_socket, child_end = socket.socketpair()
        with child_end:
            self._process = subprocess.Popen(
                # Started by path, because it imports nothing from this package.
                [sys.executable, "-P", str(SERVER), json.dumps(said)],
                stdin=child_end.fileno(),
                # Ctrl-C goes only to the worker, which ends this process itself.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._path = ""

    def await_model(self) -> None:
        """Returns when the model is loaded. Raises `LoadError`."""
        self._path = self._control_socket.recv(4096).decode()
        if not self._path:
            code = self._process.wait()
            raise LoadError(f"llama.cpp exited with code {code} (see its output above)")

    def get(self, route: str) -> dict[str, Any]:
        """Sends a GET request. Raises `DeviceLost` if the server does not respond."""
        return self._ask("GET", route, None)

    def post(self, route: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Sends a POST request. Raises `Invalid` or `Failed` for an error response, and
        `DeviceLost` if the server does not respond."""
        return self._ask("POST", route, json.dumps(asked))

    def close(self) -> None:
        """Ends the process."""
        # Shut down first: a thread that waits for the model still uses the socket.
        with contextlib.suppress(OSError):
            self._control_socket.shutdown(socket.SHUT_RDWR)
        self._control_socket.close()
        try:
            self._process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, route: str, body: str | None) -> dict[str, Any]:
        # One connection per request. Over a Unix socket this is cheaper than checking whether a
        # kept connection is still open.
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
