"""Streams a completion over gRPC from Python, with no generated code: the server describes its own
messages (reflection), and they are built from that.

With a server on its default addresses (`tokenway serve`):

    pip install -r examples/requirements.txt
    python examples/python_grpc_client.py "The capital of France is" --max-tokens 32

It ends with exit code 1 where the server is not serving or refuses, the stream ends with an error, or
the stream ends without its summary and was therefore cut short.
"""

import argparse
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
    """A service as its server describes it."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        # A pool of its own: in the default one, a package that brings its own copy of a proto (such
        # as that of the health service) would be in the way.
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self._channel = channel
        self._name = name
        self._methods = pool.FindServiceByName(name).methods_by_name

    def request(self, method: str, **fields: Any) -> Message:
        """A request of this method, with these fields."""
        return GetMessageClass(self._methods[method].input_type)(**fields)

    def method(self, method: str) -> Callable[..., Any]:
        """This method, to be called with its request."""
        descriptor = self._methods[method]
        channel = self._channel
        kind: Any = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        return kind(
            f"/{self._name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )


def reason(error: grpc.RpcError) -> str:
    """The code by which programs know an error, such as `queue_full`; where the error is not from
    Tokenway itself (nobody listens, say), gRPC's own code."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return error.code().name


def check_health(channel: grpc.Channel) -> None:
    """Fails unless the server takes requests."""
    health = Service(channel, "grpc.health.v1.Health")
    request = health.request("Check", service="tokenway.v1.Inference")
    answer = health.method("Check")(request, timeout=5)
    name = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[answer.status].name
    if name != "SERVING":
        raise RuntimeError(f"the server is {name}")


def stream(channel: grpc.Channel, prompt: str, max_tokens: int) -> None:
    """Prints each token as it comes, then what it took."""
    inference = Service(channel, "tokenway.v1.Inference")
    request = inference.request("Complete", prompt=prompt, max_tokens=max_tokens)
    # The server holds the whole stream to this deadline. `events.cancel()` would end it at once, and
    # free its slot on the server.
    events = inference.method("Complete")(request, timeout=60)
    summary = None
    for event in events:
        if event.HasField("tokens"):
            for token in event.tokens.tokens:
                print(token.text, end="", flush=True)
        elif event.HasField("summary"):
            summary = event.summary
    if summary is None:
        raise RuntimeError("the stream ended without a summary: it was cut short")
    usage, timings = summary.usage, summary.timings
    print(
        f"\nusage: {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} completion tokens"
    )
    print(
        f"timings: first token after {timings.first_token_ns / 1e6:.1f} ms, "
        f"all after {timings.total_ns / 1e6:.1f} ms"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams a completion over gRPC.")
    parser.add_argument("prompt", help="what to complete")
    parser.add_argument("--max-tokens", type=int, default=32, help="the most tokens to generate")
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server's gRPC door")
    args = parser.parse_args()
    with grpc.insecure_channel(args.address) as channel:
        try:
            check_health(channel)
            stream(channel, args.prompt, args.max_tokens)
        except grpc.RpcError as error:
            print(f"error: {error.details()} ({reason(error)})", file=sys.stderr)
            if reason(error) == "UNAVAILABLE":
                print("The server must run: `make run` starts it.", file=sys.stderr)
            return 1
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
