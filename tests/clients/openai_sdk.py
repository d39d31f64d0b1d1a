"""OpenAI's official library for Python: completions. `tests/clients` starts the servers."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from cases import reading, run, tokens

MODEL = "llm_test"
PROMPT = "The capital of France is"


def connect(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def texts(chunks: Iterable[Completion], choice: int = 0) -> list[str]:
    """The texts of a choice's chunks."""
    return [part.text for chunk in chunks for part in chunk.choices if part.index == choice]


def finish_reasons(chunks: Iterable[Completion], choice: int = 0) -> list[str | None]:
    """The finish reasons of a choice's chunks. All but the last are None."""
    return [
        part.finish_reason for chunk in chunks for part in chunk.choices if part.index == choice
    ]


def a_stream_has_every_token_in_order_and_the_usage_last(url: str) -> None:
    stream = connect(url).completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=256,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert texts(chunks) == tokens(256)
    assert finish_reasons(chunks) == [None] * 255 + ["length"]
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
        (last.id, MODEL, "text_completion")
    }
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    usage = last.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 256, 261)


def an_async_stream_has_every_token_in_order(url: str) -> None:
    async def collect() -> list[Completion]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=256, stream=True
            )
            return [chunk async for chunk in stream]

    chunks = asyncio.run(collect())
    assert texts(chunks) == tokens(256)
    assert finish_reasons(chunks) == [None] * 255 + ["length"]


def concurrent_async_streams_have_every_token_in_order(url: str) -> None:
    async def one(client: AsyncOpenAI) -> list[str]:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=256, stream=True
        )
        return texts([chunk async for chunk in stream])

    async def many() -> list[list[str]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(20)))

    assert asyncio.run(many()) == [tokens(256)] * 20


def a_unary_completion_has_the_whole_text_and_its_usage(url: str) -> None:
    completion = connect(url).completions.create(model=MODEL, prompt=PROMPT, max_tokens=256)
    [choice] = completion.choices
    assert choice.text == "".join(tokens(256))
    assert (choice.index, choice.finish_reason) == (0, "length")
    usage = completion.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 256, 261)


def prompts_and_choices_are_identified_by_index(url: str) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["a", "b c", "d"],
        "max_tokens": 20,
        "n": 2,
    }
    chunks = list(connect(url).completions.create(**request, stream=True))
    for choice in range(6):
        assert texts(chunks, choice) == tokens(20)
        assert finish_reasons(chunks, choice) == [None] * 19 + ["length"]
    completion = connect(url).completions.create(**request)
    assert [choice.index for choice in completion.choices] == list(range(6))
    assert {choice.text for choice in completion.choices} == {"".join(tokens(20))}
    usage = completion.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 6 * 20)


def a_stop_string_ends_the_text_and_is_left_out(url: str) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 256,
        "stop": ["never", "token_7"],
    }
    chunks = list(connect(url).completions.create(**request, stream=True))
    assert "".join(texts(chunks)) == "".join(tokens(7))
    assert finish_reasons(chunks)[-1] == "stop"
    [choice] = connect(url).completions.create(**request).choices
    assert (choice.text, choice.finish_reason) == ("".join(tokens(7)), "stop")


def models_are_listed_and_described(url: str) -> None:
    client = connect(url)
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "tokenway")
    assert client.models.retrieve(MODEL) == model


def a_rejected_request_raises_bad_request_with_param_and_code(url: str) -> None:
    rejected: list[tuple[dict[str, Any], str, str]] = [
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 2_000_000}, "max_tokens", "context_length_exceeded"),
        ({"suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
    ]
    for fields, param, code in rejected:
        for stream in [False, True]:
            try:
                connect(url).completions.create(model=MODEL, prompt=PROMPT, stream=stream, **fields)
            except openai.BadRequestError as error:
                assert (error.param, error.code) == (param, code), error
                assert error.type == "invalid_request_error", error
                assert error.request_id, error
            else:
                raise AssertionError(f"{fields} is not rejected")


def unknown_models_and_routes_are_not_found(url: str) -> None:
    client = connect(url)
    missing: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.completions.create(model="other", prompt=PROMPT), "model_not_found"),
        (lambda: client.models.retrieve("other"), "model_not_found"),
        (lambda: client.embeddings.create(model=MODEL, input=PROMPT), "not_found"),
    ]
    for ask, code in missing:
        try:
            ask()
        except openai.NotFoundError as error:
            assert error.code == code, error
        else:
            raise AssertionError(f"no {code} was raised")


def assert_rejected(
    url: str, kind: type[openai.APIStatusError], status: int, code: str, **fields: Any
) -> None:
    """Sends a request, unary and streamed, and asserts that it fails with this error of the library."""
    for stream in [False, True]:
        ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "stream": stream, **fields}
        try:
            connect(url).completions.create(**ask)
        except kind as error:
            assert (error.status_code, error.code) == (status, code), error
        else:
            raise AssertionError(f"{fields} is not rejected")


def an_oversized_request_is_rejected(url: str) -> None:
    prompt = "word " * 1_000_000
    assert_rejected(url, openai.APIStatusError, 413, "request_too_large", prompt=prompt)


def an_unsupported_accept_header_is_rejected(url: str) -> None:
    try:
        connect(url).completions.create(
            model=MODEL, prompt=PROMPT, stream=True, extra_headers={"Accept": "text/html"}
        )
    except openai.APIStatusError as error:
        assert (error.status_code, error.code) == (406, "not_acceptable"), error
    else:
        raise AssertionError("a stream of HTML is not rejected")


def a_model_that_is_not_ready_is_unavailable(url: str) -> None:
    assert_rejected(url, openai.InternalServerError, 503, "not_ready")


def a_deadline_that_expires_in_the_queue_raises(url: str) -> None:
    headers = {"x-request-timeout": "0.2"}
    assert_rejected(url, openai.InternalServerError, 504, "deadline_exceeded", extra_headers=headers)


def a_full_queue_raises_rate_limit_with_retry_after(url: str) -> None:
    for stream in [False, True]:
        try:
            connect(url).completions.create(model=MODEL, prompt=PROMPT, stream=stream)
        except openai.RateLimitError as error:
            assert (error.code, error.type) == ("queue_full", "rate_limit_error"), error
            assert error.response.headers["retry-after"] == "1"
            assert error.response.headers["retry-after-ms"] == "1000"
        else:
            raise AssertionError("the queue is not full")


def a_failing_stream_raises_after_its_last_token(url: str) -> None:
    received = []
    try:
        for chunk in connect(url).completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=256, stream=True
        ):
            received.append(chunk)
    except openai.APIError as error:
        assert error.code == "internal_error", error
        record = cast(dict[str, Any], error.body)
        assert record["tokens_delivered"] == 10, record
        assert record["retryable"] is False, record
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(10)
    assert finish_reasons(received) == [None] * 10


def an_async_failing_stream_raises_after_its_last_token(url: str) -> None:
    received = []

    async def collect() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=256, stream=True
            )
            async for chunk in stream:
                received.append(chunk)

    try:
        asyncio.run(collect())
    except openai.APIError as error:
        assert error.code == "internal_error", error
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(10)


def a_unary_failure_raises_and_is_not_retried(url: str) -> None:
    # The library's default number of retries, which the response disables.
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    try:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=256)
    except openai.InternalServerError as error:
        assert (error.status_code, error.code) == (500, "internal_error"), error
    else:
        raise AssertionError("a partial completion was accepted")


def a_truncated_stream_raises(url: str) -> None:
    received = []
    try:
        for chunk in connect(url).completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=100_000, stream=True
        ):
            received.append(chunk)
            if len(received) == 1:
                reading()
    except openai.APIConnectionError:
        pass
    else:
        raise AssertionError(f"{len(received)} tokens were accepted as a complete response")
    assert texts(received) == tokens(len(received))


def closing_a_stream_early_frees_the_slot(url: str) -> None:
    client = connect(url)
    with client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=100_000, stream=True
    ) as stream:
        assert next(stream).choices[0].text == "token_0"
    completion = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3)
    assert completion.choices[0].text == "".join(tokens(3))


if __name__ == "__main__":
    raise SystemExit(
        run(
            a_stream_has_every_token_in_order_and_the_usage_last,
            an_async_stream_has_every_token_in_order,
            concurrent_async_streams_have_every_token_in_order,
            a_unary_completion_has_the_whole_text_and_its_usage,
            prompts_and_choices_are_identified_by_index,
            a_stop_string_ends_the_text_and_is_left_out,
            models_are_listed_and_described,
            a_rejected_request_raises_bad_request_with_param_and_code,
            unknown_models_and_routes_are_not_found,
            an_oversized_request_is_rejected,
            an_unsupported_accept_header_is_rejected,
            a_full_queue_raises_rate_limit_with_retry_after,
            a_model_that_is_not_ready_is_unavailable,
            a_deadline_that_expires_in_the_queue_raises,
            a_failing_stream_raises_after_its_last_token,
            an_async_failing_stream_raises_after_its_last_token,
            a_unary_failure_raises_and_is_not_retried,
            a_truncated_stream_raises,
            closing_a_stream_early_frees_the_slot,
        )
    )
