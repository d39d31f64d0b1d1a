//! Requests that are rejected before the first byte of a response: status, code and field over both APIs.

mod support;

use serde_json::{Value, json};
use support::grpc::grpc_error;
use support::http::{HttpError, completion, expected_error, get, http_error, post};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tonic::Code;
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

/// Completion requests with an invalid value, and the name of the invalid field.
fn invalid_values() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
        (json!({"prompt": "a", "max_tokens": -1}), "max_tokens"),
        (json!({"prompt": "a", "temperature": 2.5}), "temperature"),
        (json!({"prompt": "a", "temperature": 1e300}), "temperature"),
        (json!({"prompt": "a", "top_p": 1.5}), "top_p"),
        (json!({"prompt": "a", "n": 0}), "n"),
        (json!({"prompt": "a", "n": 129}), "n"),
        (json!({"prompt": "a", "stop": ""}), "stop"),
        (json!({"prompt": "a", "logprobs": 6}), "logprobs"),
        (json!({"prompt": "a", "min_tokens": 17}), "min_tokens"),
        (json!({"prompt": [1], "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "stop": "x".repeat(1_025)}), "stop"),
        (json!({"prompt": "a", "model": "m".repeat(20_000)}), "model"),
    ]
}

/// Other invalid completion requests, with the error code and the field of each.
fn other_invalid_requests() -> Vec<(Value, &'static str, &'static str)> {
    vec![
        (json!({}), "missing_parameter", "prompt"),
        (json!({"prompt": 1}), "invalid_type", "prompt"),
        (
            json!({"prompt": "a", "suffix": "b"}),
            "unsupported_parameter",
            "suffix",
        ),
        (
            json!({"prompt": "a", "nonsense": 1}),
            "unknown_parameter",
            "nonsense",
        ),
        (
            json!({"prompt": "a", "max_tokens": 2_000_000}),
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            json!({"prompt": "a b", "max_tokens": 1_048_575}),
            "context_length_exceeded",
            "prompt",
        ),
    ]
}

#[tokio::test]
async fn invalid_bodies_are_rejected_with_their_field() {
    let server = Setup::test_runner(full_speed()).start().await;
    let deep = "[".repeat(100_000);
    let cases: Vec<(Vec<u8>, HttpError)> = vec![
        (b"{".to_vec(), expected_error(400, "invalid_json", None)),
        (
            b"{\"prompt\":\"\xff\"}".to_vec(),
            expected_error(400, "invalid_json", None),
        ),
        (deep.into_bytes(), expected_error(400, "invalid_json", None)),
        (
            b"{\"prompt\":\"a\",\"temperature\":NaN}".to_vec(),
            expected_error(400, "invalid_json", None),
        ),
        (b"[]".to_vec(), expected_error(400, "invalid_type", None)),
    ];
    for (body, expected) in cases {
        assert_eq!(
            http_error(&server, post("/v1/completions", body)).await,
            expected
        );
    }
    let invalid_values = invalid_values().into_iter();
    let invalid_values = invalid_values.map(|(body, param)| (body, "invalid_value", param));
    for (body, code, param) in invalid_values.chain(other_invalid_requests()) {
        let expected = expected_error(400, code, Some(param));
        assert_eq!(
            http_error(&server, completion(&body)).await,
            expected,
            "{body}"
        );
    }
}

#[tokio::test]
async fn invalid_grpc_messages_are_rejected_with_their_field() {
    let server = Setup::test_runner(full_speed()).start().await;
    let invalid = |change: fn(&mut v1::CompletionRequest)| {
        let mut request = grpc::request("a", 5);
        change(&mut request);
        request
    };
    for (request, kind, param) in [
        (
            invalid(|r| r.input = None),
            ErrorKind::MissingParameter,
            "prompt",
        ),
        (
            invalid(|r| r.max_tokens = Some(0)),
            ErrorKind::InvalidValue,
            "max_tokens",
        ),
        (
            invalid(|r| r.temperature = Some(f32::NAN)),
            ErrorKind::InvalidValue,
            "temperature",
        ),
        (
            invalid(|r| r.suffix = Some("b".to_owned())),
            ErrorKind::UnsupportedParameter,
            "suffix",
        ),
        (
            invalid(|r| r.max_tokens = Some(2_000_000)),
            ErrorKind::ContextLengthExceeded,
            "max_tokens",
        ),
        (
            invalid(|r| r.model = "m".repeat(20_000)),
            ErrorKind::InvalidValue,
            "model",
        ),
        (
            invalid(|r| r.stop = vec!["x".repeat(1_025)]),
            ErrorKind::InvalidValue,
            "stop",
        ),
    ] {
        let (code, error) = grpc_error(&server, request).await;
        assert_eq!((code, error.kind), (Code::InvalidArgument, kind));
        assert_eq!(error.param.as_deref(), Some(param));
    }
    let mut request = grpc::request("a", 5);
    request.model = "nobody".to_owned();
    let (code, error) = grpc_error(&server, request).await;
    assert_eq!(
        (code, error.kind),
        (Code::NotFound, ErrorKind::ModelNotFound)
    );
    let (code, error) = grpc_error(&server, grpc::request(&"a".repeat(5 << 20), 5)).await;
    let expected = (Code::OutOfRange, ErrorKind::RequestTooLarge);
    assert_eq!((code, error.kind), expected);
}

/// Sends a message of the wrong type to an RPC. Returns the status code and the error reason.
async fn error_of_wrong_message(server: &TestServer, method: &str) -> (Code, String) {
    let channel = tonic::transport::Endpoint::from_shared(server.grpc_url());
    let channel = channel.expect("an address").connect().await;
    let mut client = tonic::client::Grpc::new(channel.expect("the server accepts connections"));
    client.ready().await.expect("the connection is open");
    let path = format!("/tokenway.v1.Inference/{method}")
        .parse()
        .expect("a path");
    // The first field of `Usage` is a number. The first field of a completion request is the model's name.
    let message = v1::Usage {
        prompt_tokens: 1,
        ..v1::Usage::default()
    };
    let codec = ProstCodec::<v1::Usage, v1::Usage>::default();
    let response = client
        .unary(tonic::Request::new(message), path, codec)
        .await;
    let status = response.expect_err("the request is rejected");
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone());
    (status.code(), reason.unwrap_or_default())
}

#[tokio::test]
async fn malformed_messages_and_unknown_methods_have_an_error_reason() {
    let server = Setup::test_runner(full_speed()).start().await;
    let broken = error_of_wrong_message(&server, "Complete").await;
    assert_eq!(broken, (Code::InvalidArgument, "invalid_json".to_owned()));
    let unknown = error_of_wrong_message(&server, "Nothing").await;
    assert_eq!(unknown, (Code::Unimplemented, "not_found".to_owned()));
}

#[tokio::test]
async fn invalid_paths_methods_types_and_sizes_have_an_error_object() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"prompt": "a", "stream": true});
    let unknown_model = completion(&json!({"prompt": "a", "model": "nobody"}));
    for (request, expected) in [
        (
            unknown_model,
            expected_error(404, "model_not_found", Some("model")),
        ),
        (
            get("/v1/models/nobody"),
            expected_error(404, "model_not_found", Some("model")),
        ),
        (
            get("/v1/models/%ff"),
            expected_error(404, "model_not_found", Some("model")),
        ),
        (get("/v1/nothing"), expected_error(404, "not_found", None)),
        (
            get("/../../etc/passwd"),
            expected_error(404, "not_found", None),
        ),
        (
            get("/v1/completions"),
            expected_error(405, "method_not_allowed", None),
        ),
        (
            post("/v1/models", "{}"),
            expected_error(405, "method_not_allowed", None),
        ),
        (
            completion(&body).accept("text/html"),
            expected_error(406, "not_acceptable", None),
        ),
        (
            completion(&body).header("content-type", "text/plain"),
            expected_error(415, "unsupported_media_type", None),
        ),
        (
            completion(&body).without_header("content-type"),
            expected_error(415, "unsupported_media_type", None),
        ),
        (
            completion(&body).header("content-encoding", "gzip"),
            expected_error(415, "unsupported_media_type", None),
        ),
        (
            // The server rejects this request because of its declared length, before it reads the body.
            completion(&body).header("content-length", "67108864"),
            expected_error(413, "request_too_large", None),
        ),
        (
            post("/v1/completions", vec![b' '; 5 << 20]),
            expected_error(413, "request_too_large", None),
        ),
        (
            completion(&body).header("x-request-id", &"x".repeat(200)),
            expected_error(400, "invalid_value", Some("x-request-id")),
        ),
    ] {
        assert_eq!(http_error(&server, request).await, expected);
    }
    let headers = completion(&body).header("x-large", &"x".repeat(1 << 20));
    assert_eq!(headers.send(&server).await.status, 431);
}

#[tokio::test]
async fn models_are_listed_and_described() {
    let server = Setup::test_runner(full_speed()).start().await;
    let (_, body) = get("/v1/models").fetch(&server).await;
    let list = body.json();
    let created = list["data"][0]["created"].clone();
    let model = json!({
        "id": "llm_test", "object": "model", "created": created, "owned_by": "tokenway",
        "max_model_len": 1_048_576, "aliases": [],
    });
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    let (_, body) = get("/v1/models/llm_test").fetch(&server).await;
    assert_eq!(body.json(), model);
}
