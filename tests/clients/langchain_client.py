"""LangChain's clients for OpenAI. `tests/clients` starts the servers."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAI

from cases import reading, run, tokens

MODEL = "llm_test"
PROMPT = "The capital of France is"


def connect(url: str, **fields: Any) -> OpenAI:
    """LangChain's client for completions."""
    settings: dict[str, Any] = {"max_tokens": 256, "max_retries": 0, **fields}
    return OpenAI(model=MODEL, base_url=f"{url}/v1", api_key="unused", **settings)


def connect_chat(url: str, **fields: Any) -> ChatOpenAI:
    """LangChain's client for chat completions."""
    settings: dict[str, Any] = {"max_tokens": 256, "max_retries": 0, "stream_usage": True, **fields}
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="unused", **settings)


def expect(kind: type[openai.APIStatusError], ask: Callable[[], Any]) -> openai.APIStatusError:
    """Sends a request that must be rejected and returns the error."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"{answer} is not rejected")


def a_completion_has_the_whole_text(url: str) -> None:
    assert connect(url).invoke(PROMPT) == "".join(tokens(256))
    assert asyncio.run(connect(url).ainvoke(PROMPT)) == "".join(tokens(256))


def a_stream_has_every_token_in_order(url: str) -> None:
    assert [text for text in connect(url).stream(PROMPT) if text] == tokens(256)


def an_async_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[str]:
        return [text async for text in connect(url).astream(PROMPT) if text]

    assert asyncio.run(collect()) == tokens(256)


def prompts_and_choices_are_kept_apart(url: str) -> None:
    answer = connect(url, max_tokens=20, n=2).generate(["a", "b c"])
    assert len(answer.generations) == 2
    for choices in answer.generations:
        assert [choice.text for choice in choices] == ["".join(tokens(20))] * 2
        reasons = [(choice.generation_info or {})["finish_reason"] for choice in choices]
        assert reasons == ["length"] * 2
    assert answer.llm_output is not None
    assert answer.llm_output["token_usage"]["completion_tokens"] == 4 * 20, answer.llm_output


def each_rejection_raises_the_matching_exception(url: str) -> None:
    client = connect(url)
    rejected: list[tuple[dict[str, Any], type[openai.APIStatusError], int, str, str | None]] = [
        ({"max_tokens": 0}, openai.BadRequestError, 400, "invalid_value", "max_tokens"),
        ({"model": "other"}, openai.NotFoundError, 404, "model_not_found", "model"),
        ({"suffix": "x" * 5_000_000}, openai.APIStatusError, 413, "request_too_large", None),
    ]
    for fields, kind, status, code, param in rejected:
        for ask in [client.invoke, lambda prompt, **rest: list(client.stream(prompt, **rest))]:
            error = expect(kind, lambda ask=ask, fields=fields: ask(PROMPT, **fields))
            assert (error.status_code, error.code, error.param) == (status, code, param), error


def a_full_queue_raises_rate_limit_with_retry_after(url: str) -> None:
    error = expect(openai.RateLimitError, lambda: connect(url).invoke(PROMPT))
    assert error.code == "queue_full", error
    assert error.response.headers["retry-after"] == "1"


def a_model_that_is_not_ready_is_unavailable(url: str) -> None:
    error = expect(openai.InternalServerError, lambda: connect(url).invoke(PROMPT))
    assert (error.status_code, error.code) == (503, "not_ready"), error


def a_deadline_that_expires_in_the_queue_raises(url: str) -> None:
    client = connect(url, default_headers={"x-request-timeout": "0.2"})
    error = expect(openai.InternalServerError, lambda: client.invoke(PROMPT))
    assert (error.status_code, error.code) == (504, "deadline_exceeded"), error


def a_failing_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for text in connect(url).stream(PROMPT):
            received.append(text)
    except openai.APIError as error:
        assert error.code == "internal_error", error
    else:
        raise AssertionError(f"{received} were accepted as a complete response")
    assert received == tokens(10)


def a_failing_completion_raises(url: str) -> None:
    error = expect(openai.InternalServerError, lambda: connect(url).invoke(PROMPT))
    assert (error.status_code, error.code) == (500, "internal_error"), error


def a_truncated_stream_raises(url: str) -> None:
    received = []
    try:
        for text in connect(url, max_tokens=100_000).stream(PROMPT):
            received.append(text)
            if len(received) == 1:
                reading()
    except openai.APIConnectionError:
        pass
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert received == tokens(len(received))


def a_chat_completion_has_the_whole_text_and_its_usage(url: str) -> None:
    message = connect_chat(url).invoke([("system", "Be brief."), ("human", PROMPT)])
    assert message.content == "".join(tokens(256))
    assert message.response_metadata["finish_reason"] == "length", message
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == 256, message


def assert_complete_chat(chunks: list[AIMessageChunk]) -> None:
    """Asserts that the chunks have every token once, the finish reason and the usage."""
    assert [chunk.content for chunk in chunks if chunk.content] == tokens(256)
    reasons = [chunk.response_metadata.get("finish_reason") for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["length"], reasons
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [256], usages


def a_chat_stream_has_every_token_in_order(url: str) -> None:
    assert_complete_chat(list(connect_chat(url).stream(PROMPT)))


def an_async_chat_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[AIMessageChunk]:
        return [chunk async for chunk in connect_chat(url).astream(PROMPT)]

    assert_complete_chat(asyncio.run(collect()))


def a_chat_with_tools_is_rejected(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    client = connect_chat(url).bind_tools([tool])
    error = expect(openai.BadRequestError, lambda: client.invoke(PROMPT))
    assert (error.code, error.param) == ("unsupported_parameter", "tools"), error


def a_failing_chat_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for chunk in connect_chat(url).stream(PROMPT):
            received.append(chunk.content)
    except openai.APIError as error:
        assert error.code == "internal_error", error
    else:
        raise AssertionError(f"{received} were accepted as a complete response")
    assert [text for text in received if text] == tokens(10)


if __name__ == "__main__":
    raise SystemExit(
        run(
            a_completion_has_the_whole_text,
            a_stream_has_every_token_in_order,
            an_async_stream_has_every_token_in_order,
            prompts_and_choices_are_kept_apart,
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
