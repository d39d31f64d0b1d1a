//! `/tokenize`, `/detokenize` and `/tokenizer_info` of a server and of a gateway.

mod support;

use serde_json::{Value, json};
use support::http::{expected_error, get, http_error, post};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed};

async fn post_and_parse(server: &TestServer, path: &str, body: &Value) -> Value {
    let (response, answer) = post(path, body.to_string()).fetch(server).await;
    assert_eq!(response.status, 200, "{}", answer.text);
    answer.json()
}

#[tokio::test]
async fn text_and_chats_are_tokenized_and_tokens_detokenized() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let tokens = |count: u32| {
        let ids: Vec<_> = (0..count).collect();
        json!({"count": count, "max_model_len": 1_048_576, "tokens": ids})
    };
    for server in [&engine, &gateway] {
        let text = json!({"prompt": "a b c", "model": "llm_test"});
        assert_eq!(post_and_parse(server, "/tokenize", &text).await, tokens(3));
        let chat = json!({"messages": [{"role": "user", "content": "a b c"}]});
        assert_eq!(post_and_parse(server, "/tokenize", &chat).await, tokens(4));
        let ids = json!({"tokens": [7, 8]});
        let expected = json!({"prompt": "token_7token_8"});
        assert_eq!(post_and_parse(server, "/detokenize", &ids).await, expected);
    }
}

#[tokio::test]
async fn tokenize_reaches_the_engine_that_serves_the_model() {
    let engine = |name: &str| {
        let mut setup = Setup::test_runner(full_speed());
        setup.engine().models[0].name = name.to_owned();
        setup.start()
    };
    let (first, second) = tokio::join!(engine("first"), engine("second"));
    let gateway = Setup::gateway(&[&first, &second]).start().await;
    for model in ["first", "second"] {
        let body = json!({"prompt": "a", "model": model});
        assert_eq!(
            post_and_parse(&gateway, "/tokenize", &body).await["count"],
            1
        );
        let body = json!({"tokens": [1], "model": model});
        let answer = post_and_parse(&gateway, "/detokenize", &body).await;
        assert_eq!(answer["prompt"], "token_1");
    }
}

#[tokio::test]
async fn tokenizer_info_is_reported_per_model() {
    let mut setup = Setup::test_runner(full_speed());
    setup.engine().models[0].name = "first".to_owned();
    let mut second = setup.engine().models[0].clone();
    second.name = "second".to_owned();
    setup.engine().models.push(second);
    let server = setup.start().await;
    let (response, body) = get("/tokenizer_info?model=second").fetch(&server).await;
    assert_eq!(response.status, 200);
    assert_eq!(body.json()["model_max_length"], 1_048_576);
    for (path, expected) in [
        (
            "/tokenizer_info",
            expected_error(400, "missing_parameter", Some("model")),
        ),
        (
            "/tokenizer_info?model=third",
            expected_error(404, "model_not_found", Some("model")),
        ),
        (
            "/tokenizer_info?name=first",
            expected_error(400, "unknown_parameter", Some("name")),
        ),
    ] {
        assert_eq!(http_error(&server, get(path)).await, expected, "{path}");
    }
}

#[tokio::test]
async fn invalid_tokenize_requests_are_rejected_and_counted() {
    let server = Setup::test_runner(full_speed()).start().await;
    for (path, body, expected) in [
        (
            "/tokenize",
            json!({"prompt": "a", "model": "nobody"}),
            expected_error(404, "model_not_found", Some("model")),
        ),
        (
            "/tokenize",
            json!({"messages": []}),
            expected_error(400, "invalid_value", Some("messages")),
        ),
        (
            "/detokenize",
            json!({"tokens": "a"}),
            expected_error(400, "invalid_type", Some("tokens")),
        ),
    ] {
        let request = post(path, body.to_string());
        assert_eq!(http_error(&server, request).await, expected);
    }
    let plain = post("/tokenize", "{}").header("content-type", "text/plain");
    let expected = expected_error(415, "unsupported_media_type", None);
    assert_eq!(http_error(&server, plain).await, expected);
    let counted = |reason: &str| {
        let metric = "tokenway_requests_rejected_total";
        format!("{metric}{{api=\"http\",reason=\"{reason}\"}}")
    };
    let counts = MetricsSnapshot::take(&server);
    for reason in ["model_not_found", "invalid_value", "unsupported_media_type"] {
        assert_eq!(counts.get(&counted(reason)), 1.0, "{}", counts.0);
    }
}
