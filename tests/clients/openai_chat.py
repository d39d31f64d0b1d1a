"""OpenAI's official library for Python: chat completions. `tests/clients` starts the servers."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any, cast

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from cases import reading, run, tokens

MODEL = "llm_test"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def connect(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def stream(url: str, **fields: Any) -> Iterable[ChatCompletionChunk]:
    ask: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "stream": True, **fields}
    return cast(Iterable[ChatCompletionChunk], connect(url).chat.completions.create(**ask))


def texts(chunks: Iterable[ChatCompletionChunk], choice: int = 0) -> list[str]:
    """The texts of a choice's chunks, without the empty text of the role."""
    parts = [part for chunk in chunks for part in chunk.choices if part.index == choice]
    return [part.delta.content for part in parts if part.delta.content]


def a_stream_has_the_role_then_every_token_then_the_usage(url: str) -> None:
    chunks = stream(url, max_completion_tokens=256, stream_options={"include_usage": True})
    first, *chunks, last = chunks
    assert first.id.startswith("chatcmpl-"), first
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", ""), first
    assert texts(chunks) == tokens(256)
    reasons = [part.finish_reason for chunk in chunks for part in chunk.choices]
    assert reasons == [None] * 256 + ["length"]
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
        (first.id, MODEL, "chat.completion.chunk")
    }
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 256


def an_async_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[ChatCompletionChunk]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            chunks = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=256, stream=True
            )
            return [chunk async for chunk in chunks]

    assert texts(asyncio.run(collect())) == tokens(256)


def a_unary_completion_has_the_whole_message_and_its_usage(url: str) -> None:
    completion = connect(url).chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=256
    )
    assert completion.id.startswith("chatcmpl-"), completion
    assert completion.object == "chat.completion"
    [choice] = completion.choices
    assert choice.message.role == "assistant", choice
    assert choice.message.content == "".join(tokens(256))
    assert choice.finish_reason == "length"
    usage = completion.usage
    assert usage is not None
    assert usage.completion_tokens == 256
    assert usage.total_tokens == usage.prompt_tokens + 256


def choices_are_identified_by_index(url: str) -> None:
    chunks = list(stream(url, max_tokens=20, n=3))
    for choice in range(3):
        assert texts(chunks, choice) == tokens(20)
    completion = connect(url).chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, n=3
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]


def the_stream_helper_joins_a_tool_call(url: str) -> None:
    ask: dict[str, Any] = {"model": "m", "messages": MESSAGES, "tools": [WEATHER]}
    with connect(url).chat.completions.stream(**ask) as events:
        for _ in events:
            pass
        completion = events.get_final_completion()
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls", choice
    [call] = choice.message.tool_calls or []
    assert (call.id, call.type, call.function.name) == ("call_a", "function", "weather"), call
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def a_stream_has_the_reasoning_before_the_tool_call(url: str) -> None:
    chunks = stream(url, model="m", tools=[WEATHER])
    deltas = [part.delta for chunk in chunks for part in chunk.choices]
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(reasoning) == "One city."
    last = max(at for at, text in enumerate(reasoning) if text)
    calls = [at for at, delta in enumerate(deltas) if delta.tool_calls]
    assert calls and last < calls[0], deltas


def a_unary_completion_has_the_tool_call(url: str) -> None:
    ask: dict[str, Any] = {"model": "m", "messages": MESSAGES, "tools": [WEATHER]}
    completion = connect(url).chat.completions.create(**ask)
    message = completion.choices[0].message
    assert message.content is None, message
    [call] = message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    details = completion.usage and completion.usage.completion_tokens_details
    assert details is not None and details.reasoning_tokens == 4, completion.usage


def a_rejected_request_raises_bad_request_with_param_and_code(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rejected: list[tuple[dict[str, Any], str, str]] = [
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"tools": [tool]}, "tools", "unsupported_parameter"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            "unsupported_parameter",
        ),
        ({"messages": []}, "messages", "invalid_value"),
    ]
    for fields, param, code in rejected:
        for streamed in [False, True]:
            try:
                stream(url, **{"stream": streamed, **fields})
            except openai.BadRequestError as error:
                assert (error.param, error.code) == (param, code), error
            else:
                raise AssertionError(f"{fields} is not rejected")


def an_unknown_model_is_not_found(url: str) -> None:
    try:
        stream(url, model="other")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("an unknown model was accepted")


def a_full_queue_raises_rate_limit_with_retry_after(url: str) -> None:
    try:
        stream(url)
    except openai.RateLimitError as error:
        assert error.code == "queue_full", error
        assert error.response.headers["retry-after-ms"] == "1000"
    else:
        raise AssertionError("the queue is not full")


def a_failing_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for chunk in stream(url, max_tokens=256):
            received.append(chunk)
    except openai.APIError as error:
        assert error.code == "internal_error", error
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(10)


def a_truncated_stream_raises(url: str) -> None:
    received = []
    try:
        for chunk in stream(url, max_tokens=100_000):
            received.append(chunk)
            if len(received) == 1:
                reading()
    except openai.APIConnectionError:
        pass
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(len(texts(received)))


if __name__ == "__main__":
    raise SystemExit(
        run(
            a_stream_has_the_role_then_every_token_then_the_usage,
            an_async_stream_has_every_token_in_order,
            a_unary_completion_has_the_whole_message_and_its_usage,
            choices_are_identified_by_index,
            the_stream_helper_joins_a_tool_call,
            a_stream_has_the_reasoning_before_the_tool_call,
            a_unary_completion_has_the_tool_call,
            a_rejected_request_raises_bad_request_with_param_and_code,
            an_unknown_model_is_not_found,
            a_full_queue_raises_rate_limit_with_retry_after,
            a_failing_stream_raises_after_its_last_token,
            a_truncated_stream_raises,
        )
    )
