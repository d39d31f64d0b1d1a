//! Request fields that have no effect: accepted hints, and unknown fields.

mod support;

use serde_json::{Value, json};
use support::http::{Request, completion, expected_error, http_error, post};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed};

const IGNORED_FIELDS_METRIC: &str = "tokenway_ignored_fields_total";

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

async fn server_ignoring_unknown_fields() -> TestServer {
    let setup = Setup::test_runner(full_speed());
    setup.ignoring_unknown_fields().start().await
}

fn with_fields(body: &Value, fields: &Value) -> Value {
    let mut body = body.clone();
    let fields = fields.as_object().expect("fields").clone();
    body.as_object_mut().expect("a body").extend(fields);
    body
}

fn chat_request(fields: &Value) -> Request {
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    post(
        "/v1/chat/completions",
        with_fields(&body, fields).to_string(),
    )
}

fn completion_request(fields: &Value) -> Request {
    completion(&with_fields(
        &json!({"prompt": "hi", "max_tokens": 2}),
        fields,
    ))
}

#[tokio::test]
async fn hints_without_effect_are_accepted_on_both_routes() {
    let server = server().await;
    for hint in [
        json!({"prompt_cache_key": "a"}),
        json!({"prompt_cache_retention": "24h"}),
        json!({"safety_identifier": "u"}),
        json!({"service_tier": "auto"}),
        json!({"store": false, "metadata": {}}),
        json!({"logprobs": false}),
    ] {
        for request in [chat_request(&hint), completion_request(&hint)] {
            let (response, body) = request.fetch(&server).await;
            assert_eq!(response.status, 200, "{hint}: {}", body.text);
            assert_eq!(response.header("x-ignored-fields"), None);
        }
    }
    let wrong = json!({"prompt_cache_key": 1});
    let expected = expected_error(400, "invalid_type", Some("prompt_cache_key"));
    assert_eq!(http_error(&server, chat_request(&wrong)).await, expected);
    assert_eq!(
        http_error(&server, completion_request(&wrong)).await,
        expected
    );
}

#[tokio::test]
async fn an_unknown_field_is_rejected_and_the_error_names_the_setting() {
    let server = server().await;
    let (response, body) = completion_request(&json!({"no_stop_trim": false}))
        .fetch(&server)
        .await;
    assert_eq!(response.status, 400);
    let expected = (
        "unknown_parameter".to_owned(),
        Some("no_stop_trim".to_owned()),
    );
    assert_eq!(body.error(), expected);
    let message = body.json()["error"]["message"].to_string();
    assert!(message.contains("--unknown-fields ignore"), "{message}");
    assert_eq!(
        MetricsSnapshot::take(&server).get(IGNORED_FIELDS_METRIC),
        0.0
    );
}

#[tokio::test]
async fn ignored_fields_are_counted_and_listed_in_a_response_header() {
    let engine = server().await;
    let gateway = Setup::gateway(&[&engine]).ignoring_unknown_fields();
    for server in [
        server_ignoring_unknown_fields().await,
        gateway.start().await,
    ] {
        let stream = json!({"cat": 1, "stream": true, "stream_options": {"dog": 2}});
        for (request, expected) in [
            (completion_request(&json!({"cat": 1})), "cat"),
            (
                chat_request(&json!({"cat": 1, "a\r\nb: c,d": 1})),
                "a%0D%0Ab%3A%20c%2Cd,cat",
            ),
            (completion_request(&stream), "cat,stream_options.dog"),
            (chat_request(&stream), "cat,stream_options.dog"),
            (post("/tokenize", r#"{"prompt": "a", "cat": 1}"#), "cat"),
            (post("/detokenize", r#"{"tokens": [1], "cat": 1}"#), "cat"),
        ] {
            let (response, body) = request.fetch(&server).await;
            assert_eq!(response.status, 200, "{}", body.text);
            let header = response.header("x-ignored-fields").expect("the header");
            let mut names: Vec<_> = header.split(',').collect();
            names.sort_unstable();
            assert_eq!(names.join(","), expected);
        }
        let counts = MetricsSnapshot::take(&server);
        assert_eq!(counts.get(IGNORED_FIELDS_METRIC), 9.0, "{}", counts.0);
        assert!(!counts.0.contains("dog"), "{}", counts.0);
    }
}

#[tokio::test]
async fn unsupported_fields_are_rejected_even_when_unknown_fields_are_ignored() {
    let server = server_ignoring_unknown_fields().await;
    let tools = json!({"tools": [{"type": "function", "function": {"name": "f"}}], "cat": 1});
    let expected = expected_error(400, "unsupported_parameter", Some("tools"));
    assert_eq!(http_error(&server, chat_request(&tools)).await, expected);
    let expected = expected_error(400, "unsupported_parameter", Some("suffix"));
    assert_eq!(
        http_error(&server, completion_request(&json!({"suffix": "a"}))).await,
        expected
    );
}
