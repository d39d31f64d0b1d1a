"""A plain HTTP client without a preferred stream format: httpx2, which OpenAI's library uses, sends `Accept: */*`."""

import json

import httpx2

from cases import run, tokens

BODY = {"prompt": "The capital of France is", "max_tokens": 256, "stream": True}


def a_client_that_accepts_anything_gets_one_line_per_token(url: str) -> None:
    with httpx2.stream("POST", f"{url}/v1/completions", json=BODY) as response:
        assert response.request.headers["accept"] == "*/*"
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.iter_lines()]
    choices = [line["choices"][0] for line in lines]
    assert [choice["text"] for choice in choices] == tokens(256)
    assert [choice["finish_reason"] for choice in choices] == [None] * 255 + ["length"]


def a_failing_stream_has_an_error_record_and_then_raises(url: str) -> None:
    lines = []
    try:
        with httpx2.stream("POST", f"{url}/v1/completions", json=BODY) as response:
            for line in response.iter_lines():
                lines.append(json.loads(line))
    except httpx2.RemoteProtocolError:
        pass
    else:
        raise AssertionError("the stream ended cleanly instead of failing")
    *parts, record = lines
    assert [part["choices"][0]["text"] for part in parts] == tokens(10)
    assert record["error"]["code"] == "internal_error", record


if __name__ == "__main__":
    raise SystemExit(
        run(
            a_client_that_accepts_anything_gets_one_line_per_token,
            a_failing_stream_has_an_error_record_and_then_raises,
        )
    )
