"""Streams a completion over gRPC from Python without generated code: the message types come from the
server's reflection service.

With a server on its default addresses (`tokenway serve`):

    pip install -r examples/requirements.txt
    python examples/python_grpc_client.py "The capital of France is" --max-tokens 32

The environment variable TOKENWAY_API_KEY has the key for a server that needs one. For a server with TLS, `--tls-ca`
names the file with the certificate of its authority.

The exit code is 1 if the server is not serving or rejects the request, or if the stream ends with an
error or without a summary (which means that it was truncated).
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status


class Service:
    """A service, built from the server's reflection."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        # A separate pool: the default pool may already hold another package's copy of a proto file,
        # such as that of the health service.
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self._channel = channel
        self._name = name
        self._methods = pool.FindServiceByName(name).methods_by_name

    def request(self, method: str, **fields: Any) -> Message:
        """A request message of this method with these fields."""
        return GetMessageClass(self._methods[method].input_type)(**fields)

    def method(self, method: str) -> Callable[..., Any]:
        """This method as a callable."""
        descriptor = self._methods[method]
        channel = self._channel
        kind: Any = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        return kind(
            f"/{self._name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )


def reason(error: grpc.RpcError) -> str:
    """Tokenway's error code, such as `queue_full`, or gRPC's status code if the error is not from
    Tokenway (for example, if nothing listens)."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return error.code().name


def check_health(channel: grpc.Channel) -> None:
    """Raises `RuntimeError` unless the server is serving."""
    health = Service(channel, "grpc.health.v1.Health")
    request = health.request("Check", service="tokenway.v1.Inference")
    answer = health.method("Check")(request, timeout=5)
    name = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[answer.status].name
    if name != "SERVING":
        raise RuntimeError(f"the server is {name}")


def stream(channel: grpc.Channel, prompt: str, max_tokens: int) -> None:
    """Prints each token as it arrives, then usage and timings."""
    inference = Service(channel, "tokenway.v1.Inference")
    request = inference.request("Complete", prompt=prompt, max_tokens=max_tokens)
    key = os.environ.get("TOKENWAY_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else None
    # The server enforces this deadline for the whole stream. `events.cancel()` would cancel the
    # request and free its slot at once.
    events = inference.method("Complete")(request, timeout=60, metadata=metadata)
    summary = None
    for event in events:
        if event.HasField("tokens"):
            for token in event.tokens.tokens:
                print(token.text, end="", flush=True)
        elif event.HasField("summary"):
            summary = event.summary
    if summary is None:
        raise RuntimeError("the stream ended without a summary: it was truncated")
    usage, timings = summary.usage, summary.timings
    print(
        f"\nusage: {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} completion tokens"
    )
    print(
        f"timings: first token after {timings.first_token_ns / 1e6:.1f} ms, "
        f"all after {timings.total_ns / 1e6:.1f} ms"
    )


def connect(address: str, tls_ca: str | None) -> grpc.Channel:
    """A channel to the server, with TLS if there is a file with the certificate of its authority."""
    if tls_ca is None:
        return grpc.insecure_channel(address)
    with open(tls_ca, "rb") as file:
        credentials = grpc.ssl_channel_credentials(root_certificates=file.read())
    return grpc.secure_channel(address, credentials)


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams a completion over gRPC.")
    parser.add_argument("prompt", help="the prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="maximum number of tokens to generate")
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of the server's gRPC API")
    parser.add_argument("--tls-ca", metavar="FILE", help="certificate of the server's authority, for a server with TLS")
    args = parser.parse_args()
    with connect(args.address, args.tls_ca) as channel:
        try:
            check_health(channel)
            stream(channel, args.prompt, args.max_tokens)
        except grpc.RpcError as error:
            print(f"error: {error.details()} ({reason(error)})", file=sys.stderr)
            if reason(error) == "UNAVAILABLE":
                print("Is the server running? Start it with `make run`.", file=sys.stderr)
            return 1
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
