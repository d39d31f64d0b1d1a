"""LiteLLM's library. `tests/clients` starts the servers."""

import asyncio
import os
from typing import Any

# Use the bundled price table instead of downloading it.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from cases import reading, run, tokens

PROMPT = "The capital of France is"


def ask(url: str, **fields: Any) -> dict[str, Any]:
    """Arguments of a completion."""
    return {
        "model": "text-completion-openai/llm_test",
        "prompt": PROMPT,
        "max_tokens": 256,
        "api_base": f"{url}/v1",
        "api_key": "unused",
        "max_retries": 0,
        **fields,
    }


def ask_chat(url: str, **fields: Any) -> dict[str, Any]:
    """Arguments of a chat completion."""
    return {
        "model": "openai/llm_test",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 256,
        "api_base": f"{url}/v1",
        "api_key": "unused",
        "max_retries": 0,
        **fields,
    }


def contents(chunks: list[Any]) -> list[str]:
    """The texts of a chat's chunks, without the chunks of the role and the finish reason."""
    parts = [part for chunk in chunks for part in chunk.choices]
    return [part.delta.content for part in parts if part.delta.content]


def texts(chunks: list[Any], choice: int = 0) -> list[str]:
    """The texts of a choice's chunks, without the chunk of the finish reason."""
    parts = [part for chunk in chunks for part in chunk.choices if part.index == choice]
    return [part.text for part in parts if part.text]


def expect(kind: type[Exception], request: dict[str, Any]) -> Any:
    """Sends a request that must be rejected, unary and streamed. Returns the last error."""
    for stream in [False, True]:
        try:
            answer = litellm.text_completion(**request, stream=stream)
            # LiteLLM sends a streamed request only when the stream is read.
            answer = list(answer) if stream else answer
        except kind as error:
            rejected = error
        else:
            raise AssertionError(f"{answer} is not rejected")
    return rejected


def a_completion_has_the_whole_text_and_its_usage(url: str) -> None:
    completion = litellm.text_completion(**ask(url))
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason) == ("".join(tokens(256)), "length"), choice
    assert completion.usage.completion_tokens == 256, completion.usage
    assert completion.usage.prompt_tokens == 5, completion.usage


def a_stream_has_every_token_in_order(url: str) -> None:
    chunks = list(litellm.text_completion(**ask(url), stream=True))
    assert texts(chunks) == tokens(256)
    reasons = [part.finish_reason for chunk in chunks for part in chunk.choices]
    assert [reason for reason in reasons if reason] == ["length"], reasons


def an_async_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[Any]:
        return [chunk async for chunk in await litellm.atext_completion(**ask(url), stream=True)]

    assert texts(asyncio.run(collect())) == tokens(256)


def choices_are_identified_by_index(url: str) -> None:
    completion = litellm.text_completion(**ask(url, n=3, max_tokens=20))
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.text for choice in completion.choices} == {"".join(tokens(20))}


def each_rejection_raises_the_matching_exception(url: str) -> None:
    rejected: list[tuple[dict[str, Any], type[Exception], int, str]] = [
        ({"max_tokens": -1}, litellm.BadRequestError, 400, "max_tokens"),
        ({"model": "text-completion-openai/other"}, litellm.NotFoundError, 404, "other"),
        ({"prompt": "word " * 1_000_000}, litellm.APIError, 413, "larger"),
    ]
    for fields, kind, status, word in rejected:
        error = expect(kind, ask(url, **fields))
        assert (error.status_code, word in str(error)) == (status, True), error


def a_full_queue_raises_rate_limit_with_retry_after(url: str) -> None:
    error = expect(litellm.RateLimitError, ask(url))
    assert error.status_code == 429, error
    assert error.response.headers["retry-after"] == "1", error.response.headers


def a_model_that_is_not_ready_is_unavailable(url: str) -> None:
    error = expect(litellm.ServiceUnavailableError, ask(url))
    assert error.status_code == 503, error


def a_deadline_that_expires_in_the_queue_raises(url: str) -> None:
    error = expect(litellm.Timeout, ask(url, extra_headers={"x-request-timeout": "0.2"}))
    assert "deadline" in str(error), error


def a_failing_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for chunk in litellm.text_completion(**ask(url), stream=True):
            received.append(chunk)
    except litellm.InternalServerError as error:
        assert "The model failed" in str(error), error
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(10)


def a_failing_completion_raises(url: str) -> None:
    try:
        litellm.text_completion(**ask(url))
    except litellm.InternalServerError as error:
        assert error.status_code == 500, error
    else:
        raise AssertionError("a partial completion was accepted as a complete response")


def a_truncated_stream_raises(url: str) -> None:
    received = []
    try:
        for chunk in litellm.text_completion(**ask(url, max_tokens=100_000), stream=True):
            received.append(chunk)
            if len(received) == 1:
                reading()
    except litellm.InternalServerError as error:
        assert "Connection error" in str(error), error
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(len(texts(received)))


def a_chat_completion_has_the_whole_text_and_its_usage(url: str) -> None:
    completion = litellm.completion(**ask_chat(url))
    [choice] = completion.choices
    assert choice.message.content == "".join(tokens(256)), choice
    assert choice.finish_reason == "length", choice
    assert completion.usage.completion_tokens == 256, completion.usage


def a_chat_stream_has_every_token_in_order(url: str) -> None:
    chunks = list(litellm.completion(**ask_chat(url), stream=True))
    assert contents(chunks) == tokens(256)
    reasons = [part.finish_reason for chunk in chunks for part in chunk.choices]
    assert [reason for reason in reasons if reason] == ["length"], reasons


def an_async_chat_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[Any]:
        return [chunk async for chunk in await litellm.acompletion(**ask_chat(url), stream=True)]

    assert contents(asyncio.run(collect())) == tokens(256)


def a_chat_with_tools_is_rejected(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    try:
        litellm.completion(**ask_chat(url, tools=[tool]))
    except litellm.BadRequestError as error:
        assert "tools" in str(error), error
    else:
        raise AssertionError("tools are not rejected")


def a_failing_chat_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for chunk in litellm.completion(**ask_chat(url), stream=True):
            received.append(chunk)
    except litellm.exceptions.MidStreamFallbackError as error:
        assert "The model failed" in str(error), error
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert contents(received) == tokens(10)


if __name__ == "__main__":
    raise SystemExit(
        run(
            a_completion_has_the_whole_text_and_its_usage,
            a_stream_has_every_token_in_order,
            an_async_stream_has_every_token_in_order,
            choices_are_identified_by_index,
            each_rejection_raises_the_matching_exception,
            a_full_queue_raises_rate_limit_with_retry_after,
            a_model_that_is_not_ready_is_unavailable,
            a_deadline_that_expires_in_the_queue_raises,
            a_failing_stream_raises_after_its_last_token,
            a_failing_completion_raises,
            a_truncated_stream_raises,
            a_chat_completion_has_the_whole_text_and_its_usage,
            a_chat_stream_has_every_token_in_order,
            an_async_chat_stream_has_every_token_in_order,
            a_chat_with_tools_is_rejected,
            a_failing_chat_stream_raises_after_its_last_token,
        )
    )
