"""The one text that all engines know, and its faulty versions.

After the prompt `hi`, and the part of the text that follows it in the request, an engine sends the
rest word by word.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate

from .engine import Answer, Chunk, Do, Json, Raw, Received, Script, Step

WORDS = ("Once", " upon", " a", " time", " a", " f\u00f6x", " sat", " here.")
TEXT = "".join(WORDS)
DONE = Chunk(b"data: [DONE]\n\n")


@dataclass(frozen=True)
class Teller:
    """The facts in which the engines differ, so that a client can tell who answered."""

    model: str
    prompt_tokens: int


A = Teller("m-a", 3)
B = Teller("m-b", 5)


def event(data: Json) -> Chunk:
    return Chunk(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")


def error(status: int, code: str = "scripted", *headers: str) -> Answer:
    """A rejection in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": f"scripted {status}", "type": kind, "param": None, "code": code}
    return Answer(status, {"error": body}, headers)


def delta(request: Received, model: str, text: str, finish: str | None, index: int = 0) -> Json:
    """One event of a streamed response."""
    choice: Json = {"index": index, "finish_reason": finish}
    choice |= {"delta": {"content": text}} if request.is_chat else {"text": text, "logprobs": None}
    kind = "chat.completion.chunk" if request.is_chat else "text_completion"
    return {"id": "x-1", "object": kind, "created": 1, "model": model, "choices": [choice]}


def known_words(request: Received) -> int | None:
    """The number of words that the request contains. `None` if it is no request for the story."""
    if request.is_chat:
        messages = request.body["messages"]
        known = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    else:
        prompt = request.body["prompt"]
        prompt = prompt[0] if isinstance(prompt, list) else prompt
        if not prompt.startswith("hi"):
            return None
        known = prompt.removeprefix("hi")
    if isinstance(known, list):
        known = "".join(part["text"] for part in known)
    texts = ["".join(WORDS[:count]) for count in range(len(WORDS) + 1)]
    return texts.index(known) if known in texts else None


def tell(request: Received, teller: Teller) -> list[Step]:
    """An honest response."""
    known = known_words(request)
    if known is None:
        return [error(400, "not_the_story")]
    words = WORDS[known:]
    tokens = len(words) * (request.body.get("n") or 1)
    usage = {"prompt_tokens": teller.prompt_tokens + known, "completion_tokens": tokens}
    usage["total_tokens"] = sum(usage.values())
    if request.is_stream:
        return streamed(request, teller, words, usage)
    return [unary(request, teller, "".join(words), usage)]


def streamed(request: Received, teller: Teller, words: Sequence[str], usage: Json) -> list[Step]:
    steps: list[Step] = [Do.STREAM_HEAD]
    for at, word in enumerate(words):
        finish = "stop" if at + 1 == len(words) else None
        steps += [
            event(delta(request, teller.model, word, finish, index))
            for index in range(request.body.get("n") or 1)
        ]
    # As OpenAI's API does, usage is sent only on request.
    if (request.body.get("stream_options") or {}).get("include_usage"):
        last = delta(request, teller.model, "", None) | {"choices": [], "usage": usage}
        steps.append(event(last))
    return [*steps, DONE, Do.END]


def unary(request: Received, teller: Teller, text: str, usage: Json) -> Answer:
    content: Json = {"text": text, "logprobs": None}
    if request.is_chat:
        content = {"message": {"role": "assistant", "content": text}}
    choices = [
        {"index": index, "finish_reason": "stop"} | content
        for index in range(request.body.get("n") or 1)
    ]
    kind = "chat.completion" if request.is_chat else "text_completion"
    body = {"id": "x-1", "object": kind, "created": 1, "model": teller.model}
    return Answer(200, body | {"choices": choices, "usage": usage})


def honest(teller: Teller) -> Script:
    return lambda request: tell(request, teller)


def busy_until_date(request: Received) -> list[Step]:
    """Answers 429 once, with a date two to three seconds ahead, and then is honest."""
    if request.number > 0:
        return tell(request, A)
    date = formatdate(math.ceil(time.time()) + 2, usegmt=True)
    return [error(429, "rate_limit_exceeded", f"retry-after: {date}")]


def always(*steps: Step) -> Script:
    return lambda _: list(steps)


def first(count: int, *steps: Step) -> Script:
    """Fails this many requests, then is honest."""
    return lambda request: list(steps) if request.number < count else tell(request, A)


def cut(words: int, *end: Step) -> Script:
    """Sends this many words, and then `end`. Of a unary response, it sends about as much."""

    def script(request: Received) -> list[Step]:
        steps = tell(request, A)
        if isinstance(steps[0], Answer):
            encoded = steps[0].encode()
            at = encoded.index(WORDS[words - 1].encode()) if words else len(encoded) // 2
            return [Raw(encoded[:at]), *[step for step in end if step in tuple(Do)]]
        return [*steps[: 1 + words * (request.body.get("n") or 1)], *end]

    return script


def with_noise(*noise: Step) -> Script:
    """Is honest, but sends `noise` after its fourth word."""

    def script(request: Received) -> list[Step]:
        steps = tell(request, A)
        return [*steps[:5], *noise, *steps[5:]] if len(steps) > 5 else steps

    return script


def with_mark(request: Received) -> list[Step]:
    """Is honest, and begins with a byte order mark, which the format of event streams allows."""
    steps = tell(request, A)
    return [*steps[:1], Chunk("\ufeff".encode()), *steps[1:]] if request.is_stream else steps


def without_done(*end: Step) -> Script:
    """Sends all events but `[DONE]`, and then `end`."""

    def script(request: Received) -> list[Step]:
        steps = tell(request, A)
        return [*[step for step in steps if step not in (DONE, Do.END)], *end]

    return script


def refuses_started_answers(request: Received) -> list[Step]:
    """Is honest, but rejects a chat that ends with the start of the answer."""
    if request.is_chat and request.body["messages"][-1]["role"] == "assistant":
        return [error(400, "invalid_value")]
    return tell(request, B)
