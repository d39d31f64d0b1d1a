"""Uses Tokenway with OpenAI's Python library: a streamed completion, then a unary one.

With a server on its default addresses (`tokenway serve`):

    pip install -r examples/requirements.txt
    python examples/python_openai_client.py "The capital of France is" --max-tokens 32

The environment variable TOKENWAY_API_KEY has the key for a server that needs one. For a server with TLS, add
`--url https://localhost:8000`; SSL_CERT_FILE names the certificate of a private authority.

The exit code is 1 if the server cannot be reached or rejects the request, or if a stream fails.
"""

import argparse
import os
import sys

from openai import APIConnectionError, APIError, OpenAI


def stream(client: OpenAI, model: str, prompt: str, max_tokens: int) -> None:
    """Prints each token as it arrives. A failing stream raises `APIError`."""
    finish_reason = usage = None
    chunks = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
            finish_reason = choice.finish_reason or finish_reason
        usage = chunk.usage or usage
    # The usage comes last. Tokenway never ends a failed stream cleanly, but a proxy in between may
    # truncate a stream, and the library would not notice.
    if usage is None:
        raise RuntimeError("the stream ended without its usage: it was truncated")
    print(f"\nfinish reason: {finish_reason}")
    print(
        f"usage: {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} completion tokens"
    )


def unary(client: OpenAI, model: str, prompt: str, max_tokens: int) -> None:
    """Prints a unary completion."""
    completion = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens)
    print(f"unary: {completion.choices[0].text}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Completes a prompt with OpenAI's library.")
    parser.add_argument("prompt", help="the prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="maximum number of tokens to generate")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server's HTTP API")
    args = parser.parse_args()
    # The library requires a key. A server without keys ignores it.
    key = os.environ.get("TOKENWAY_API_KEY", "unused")
    with OpenAI(base_url=f"{args.url}/v1", api_key=key) as client:
        try:
            model = client.models.list().data[0].id
            stream(client, model, args.prompt, args.max_tokens)
            unary(client, model, args.prompt, args.max_tokens)
        except APIConnectionError as error:
            print(f"error: the connection to {args.url} failed: {error.__cause__}", file=sys.stderr)
            print("Is the server running? Start it with `make run`.", file=sys.stderr)
            return 1
        except APIError as error:
            print(f"error: {error.message} ({error.code})", file=sys.stderr)
            return 1
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
