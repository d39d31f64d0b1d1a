"""A client that behaves like the reference system's performance test: it requests the model `test`, accepts
`application/json`, and reads lines that start with `data: `. `tests/clients` starts the server.

It can also be run alone: `SERVER_BASE_URL=http://127.0.0.1:8000 python reference_performance.py`.
"""

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from cases import run, tokens

COUNT = 2_048


def milliseconds(variable: str, default: str) -> float:
    return float(os.environ.get(variable, default))


def events(url: str) -> Iterator[str]:
    """Yields the data of each event as it arrives."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    ask = {"model": "test", "prompt": "Hello", "max_tokens": COUNT, "stream": True}
    headers = {"content-type": "application/json", "accept": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(ask), headers)
    response = connection.getresponse()
    assert response.status == 200, (response.status, response.read())
    for line in response:
        text = line.decode().rstrip("\r\n")
        if text.startswith("data: "):
            yield text.removeprefix("data: ")
    connection.close()


def the_model_test_streams_2048_tokens_at_the_runners_cadence(url: str) -> None:
    texts, arrivals = [], []
    last = ""
    for last in events(url):
        if last != "[DONE]":
            arrivals.append(time.monotonic())
            texts.append(json.loads(last)["choices"][0]["text"])
    assert last == "[DONE]", last
    assert texts == tokens(COUNT), f"{len(texts)} tokens"
    interval = (arrivals[-1] - arrivals[0]) / (COUNT - 1) * 1_000
    overhead = interval - milliseconds("TEST_RUNNER_FREQUENCY_MS", "20")
    allowed = milliseconds("TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS", "3")
    assert overhead <= allowed, f"{overhead:.3f} ms per token, allowed are {allowed} ms"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        the_model_test_streams_2048_tokens_at_the_runners_cadence(os.environ["SERVER_BASE_URL"])
    else:
        raise SystemExit(run(the_model_test_streams_2048_tokens_at_the_runners_cadence))
