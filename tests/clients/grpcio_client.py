"""Python's grpcio with the gRPC API, which it knows only by reflection, through the `Service` of the example.
`tests/clients` starts the servers."""

from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from python_grpc_client import Service

from cases import reading, run, tokens

PROMPT = "The capital of France is"


def complete(channel: grpc.Channel, timeout: float | None = None, **fields: Any) -> Any:
    """Starts a completion. Returns its call, which iterates over the events."""
    inference = Service(channel, "tokenway.v1.Inference")
    return inference.method("Complete")(inference.request("Complete", **fields), timeout=timeout)


def token_texts(events: Any) -> list[str]:
    """The texts of all tokens. Checks their indices."""
    texts: list[str] = []
    for event in events:
        if event.HasField("tokens"):
            assert event.tokens.first_index == len(texts), event
            texts += [token.text for token in event.tokens.tokens]
    return texts


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The details of an error by type name."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    found = {}
    for detail in status.details:
        for kind in [ErrorInfo, BadRequest, RetryInfo]:
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


def reflection_lists_the_services(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        services = sorted(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "tokenway.v1.Inference",
    ], services


def health(channel: grpc.Channel, service: str) -> Any:
    return HealthStub(channel).Check(HealthCheckRequest(service=service)).status


def health_reports_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        for service in ["", "tokenway.v1.Inference"]:
            assert health(channel, service) == HealthCheckResponse.SERVING


def health_reports_not_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        assert health(channel, "tokenway.v1.Inference") == HealthCheckResponse.NOT_SERVING


def health_watch_reports_not_serving_while_draining(address: str) -> None:
    seen = []
    with grpc.insecure_channel(address) as channel:
        watched = HealthStub(channel).Watch(HealthCheckRequest(service="tokenway.v1.Inference"))
        for answer in watched:
            seen.append(answer.status)
            if answer.status != HealthCheckResponse.SERVING:
                break
            reading()
    assert seen == [HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING], seen


def a_stream_has_a_start_every_token_and_a_summary(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        started, *events, summary = complete(channel, prompt=PROMPT, max_tokens=256)
    assert started.started.model == "llm_test", started
    assert started.started.prompt_tokens == 5, started
    assert token_texts(events) == tokens(256)
    reasons = type(events[-1].tokens).DESCRIPTOR.fields_by_name["finish_reason"].enum_type
    assert events[-1].tokens.finish_reason == reasons.values_by_name["FINISH_REASON_LENGTH"].number
    usage = summary.summary.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 256), summary


def a_unix_socket_accepts_a_host_name_as_authority(address: str) -> None:
    # The C core's default authority is the socket's path, which is invalid in HTTP/2.
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(address, options=options) as channel:
        assert token_texts(complete(channel, prompt=PROMPT, max_tokens=3)) == tokens(3)


def cancelling_a_stream_frees_its_slot(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        events = complete(channel, prompt=PROMPT, max_tokens=100_000)
        while not next(events).HasField("tokens"):
            pass
        events.cancel()
        assert token_texts(complete(channel, prompt=PROMPT, max_tokens=3)) == tokens(3)


def an_expired_deadline_ends_the_stream_and_frees_its_slot(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        events = complete(channel, timeout=0.3, prompt=PROMPT, max_tokens=10)
        received = []
        try:
            received.extend(events)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
        else:
            raise AssertionError("the stream ended before its deadline")
        assert token_texts(complete(channel, prompt=PROMPT, max_tokens=3)) == tokens(3)


def an_error_carries_its_reason_and_field(address: str) -> None:
    rejected: list[tuple[dict[str, Any], grpc.StatusCode, str, str]] = [
        ({"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND, "model_not_found", "model"),
    ]
    for fields, code, reason, field in rejected:
        with grpc.insecure_channel(address) as channel:
            try:
                list(complete(channel, prompt=PROMPT, **fields))
            except grpc.RpcError as error:
                assert error.code() == code, error
                found = details(error)
                assert found["ErrorInfo"].reason == reason, found
                assert found["ErrorInfo"].domain == "tokenway", found
                [violation] = found["BadRequest"].field_violations
                assert violation.field == field, found
            else:
                raise AssertionError(f"{fields} is not rejected")


def a_full_queue_says_when_to_retry(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        try:
            list(complete(channel, prompt=PROMPT))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
            found = details(error)
            assert found["ErrorInfo"].reason == "queue_full", found
            assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1000, found
        else:
            raise AssertionError("the queue is not full")


def a_failing_stream_raises_after_its_last_token(address: str) -> None:
    received = []
    with grpc.insecure_channel(address) as channel:
        try:
            for event in complete(channel, prompt=PROMPT, max_tokens=256):
                received.append(event)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INTERNAL, error
            assert details(error)["ErrorInfo"].reason == "internal_error", error
        else:
            raise AssertionError("the stream ended cleanly instead of failing")
    assert token_texts(received) == tokens(10)
    assert not any(event.HasField("summary") for event in received)


def a_truncated_stream_raises(address: str) -> None:
    received = []
    with grpc.insecure_channel(address) as channel:
        try:
            for event in complete(channel, prompt=PROMPT, max_tokens=100_000):
                received.append(event)
                if len(received) == 1:
                    reading()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        else:
            raise AssertionError("the stream ended cleanly instead of failing")
    assert not any(event.HasField("summary") for event in received)


if __name__ == "__main__":
    raise SystemExit(
        run(
            reflection_lists_the_services,
            health_reports_serving,
            health_reports_not_serving,
            health_watch_reports_not_serving_while_draining,
            a_stream_has_a_start_every_token_and_a_summary,
            a_unix_socket_accepts_a_host_name_as_authority,
            cancelling_a_stream_frees_its_slot,
            an_expired_deadline_ends_the_stream_and_frees_its_slot,
            an_error_carries_its_reason_and_field,
            a_full_queue_says_when_to_retry,
            a_failing_stream_raises_after_its_last_token,
            a_truncated_stream_raises,
        )
    )
