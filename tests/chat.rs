//! Chat completions over the HTTP API.

mod support;

use serde_json::{Value, json};
use support::http::{BodyEnd, Request, expected_error, http_error, post};
use support::{Setup, TestServer, full_speed};

/// The test runner emits each token with probability 1/2, and reports the token with the following id as its first
/// alternative, with probability 1/4. These are the logprobs of the two.
#[expect(
    clippy::approx_constant,
    reason = "the value is -ln 2 as an f32 prints it"
)]
const LOGPROB_OF_HALF: f64 = -0.693_147_2;
const LOGPROB_OF_QUARTER: f64 = -1.386_294_4;

fn chat_request(body: &Value) -> Request {
    post("/v1/chat/completions", body.to_string())
}

/// Returns a chat request whose prompt has four words: the test runner renders it as `user: how are you`.
fn four_word_chat(rest: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "how are you"}]});
    let fields = rest.as_object().expect("fields").clone();
    body.as_object_mut().expect("a body").extend(fields);
    body
}

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

#[tokio::test]
async fn a_chat_completion_returns_a_message() {
    let body = four_word_chat(&json!({"max_completion_tokens": 3, "n": 2}));
    let request = chat_request(&body).header("x-request-id", "mine");
    let (response, body) = request.fetch(&server().await).await;
    assert_eq!(response.status, 200);
    let body = body.json();
    let choice = |index: u32| {
        let content = "token_0token_1token_2";
        json!({
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": null},
            "logprobs": null,
            "finish_reason": "length",
        })
    };
    let expected = json!({
        "id": "chatcmpl-mine", "object": "chat.completion", "created": body["created"],
        "model": "llm_test", "choices": [choice(0), choice(1)],
        "usage": {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10},
    });
    assert_eq!(body, expected);
}

#[tokio::test]
async fn a_stream_is_sse_with_the_role_first_and_one_delta_per_token() {
    let options = json!({"include_usage": true});
    let body = four_word_chat(&json!({"max_tokens": 2, "stream": true, "stream_options": options}));
    // OpenAI's SDKs send the first of these headers, and browsers the second.
    for accept in ["application/json", "*/*", "text/event-stream"] {
        let (response, body) = chat_request(&body)
            .accept(accept)
            .fetch(&server().await)
            .await;
        let content_type = response.header("content-type");
        assert_eq!(content_type, Some("text/event-stream; charset=utf-8"));
        assert_eq!(body.end, BodyEnd::Clean);
        let mut events = body.events();
        assert_eq!(events.pop(), Some("[DONE]"));
        let objects: Vec<Value> = events
            .iter()
            .map(|event| serde_json::from_str(event).expect("an event is JSON"))
            .collect();
        let choice = |delta: Value, reason: Option<&str>| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
        let expected = [
            choice(json!({"role": "assistant", "content": ""}), None),
            choice(json!({"content": "token_0"}), None),
            choice(json!({"content": "token_1"}), None),
            choice(json!({}), Some("length")),
            json!([]),
        ];
        let choices: Vec<_> = objects.iter().map(|object| &object["choices"]).collect();
        assert!(choices.into_iter().eq(&expected), "{objects:?}");
        let mut kinds = objects.iter().map(|object| &object["object"]);
        assert!(kinds.all(|kind| kind == "chat.completion.chunk"));
        let usage = json!({"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6});
        assert_eq!(objects[4]["usage"], usage);
    }
}

#[tokio::test]
async fn an_ndjson_stream_has_a_role_for_every_choice() {
    let body = four_word_chat(&json!({"max_tokens": 1, "stream": true, "n": 3}));
    let request = chat_request(&body).accept("application/x-ndjson");
    let (response, body) = request.fetch(&server().await).await;
    let content_type = response.header("content-type");
    assert_eq!(content_type, Some("application/x-ndjson"));
    let lines = body.lines();
    // Each of the three choices has a line with the role, a line with a token and a line with the finish reason.
    assert_eq!(lines.len(), 3 + 3 + 3);
    let roles = lines
        .iter()
        .map(|line| &line["choices"][0]["delta"]["role"]);
    assert_eq!(roles.filter(|role| *role == "assistant").count(), 3);
    let indices = lines[..3].iter().map(|line| &line["choices"][0]["index"]);
    assert!(indices.eq([0, 1, 2]));
    for index in 0..3 {
        let mut choices = lines.iter().map(|line| &line["choices"][0]);
        let last = choices.rfind(|choice| choice["index"] == index);
        let expected =
            json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": "length"});
        assert_eq!(last, Some(&expected));
    }
}

#[tokio::test]
async fn the_finish_reason_has_its_own_chunk_also_through_a_gateway() {
    let engine = server().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let options = json!({"include_usage": false});
    let fields = json!({
        "max_tokens": 2, "stream": true, "stream_options": options,
        "logprobs": true, "top_logprobs": 1,
    });
    let request = chat_request(&four_word_chat(&fields)).accept("application/x-ndjson");
    let (_, body) = request.fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(lines.len(), 1 + 2 + 1);
    let expected = json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "length"});
    assert_eq!(lines[3]["choices"], json!([expected]));
    let reasons = lines[..3]
        .iter()
        .map(|line| &line["choices"][0]["finish_reason"]);
    assert!(reasons.into_iter().all(Value::is_null));
}

#[tokio::test]
async fn chat_ignores_the_default_max_tokens_of_completions() {
    let body = four_word_chat(&json!({"stop": "token_40", "stream": true}));
    let request = chat_request(&body).accept("application/x-ndjson");
    let (_, body) = request.fetch(&server().await).await;
    let lines = body.lines();
    assert_eq!(lines.len(), 1 + 40 + 1);
    let choice = &lines[41]["choices"][0];
    assert_eq!(choice["delta"], json!({}));
    assert_eq!(choice["finish_reason"], "stop");
}

#[tokio::test]
async fn each_token_has_its_logprob_and_the_top_logprobs() {
    let server = server().await;
    let mut fields = json!({"max_tokens": 2, "logprobs": true, "top_logprobs": 2});
    let (_, body) = chat_request(&four_word_chat(&fields)).fetch(&server).await;
    let unary = body.json()["choices"][0]["logprobs"].clone();
    assert_eq!(unary["refusal"], Value::Null);
    fields["stream"] = json!(true);
    let request = chat_request(&four_word_chat(&fields)).accept("application/x-ndjson");
    let (_, body) = request.fetch(&server).await;
    let lines = body.lines();
    let streamed: Vec<Value> = lines[1..3]
        .iter()
        .map(|line| line["choices"][0]["logprobs"]["content"][0].clone())
        .collect();
    assert_eq!(unary["content"], json!(streamed));
    let (half, quarter) = (json!(LOGPROB_OF_HALF), json!(LOGPROB_OF_QUARTER));
    let entry = |token: &str, logprob: &Value| json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
    let mut expected = entry("token_1", &half);
    expected["top_logprobs"] = json!([entry("token_1", &half), entry("token_2", &quarter)]);
    assert_eq!(streamed[1], expected);
}

#[tokio::test]
async fn errors_name_the_field_as_the_client_sent_it() {
    let server = server().await;
    for (rest, code, param) in [
        (
            json!({"max_completion_tokens": 2_000_000}),
            "context_length_exceeded",
            "max_completion_tokens",
        ),
        (
            json!({"max_tokens": 2_000_000}),
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            json!({"max_tokens": 1_048_575}),
            "context_length_exceeded",
            "messages",
        ),
        (
            json!({"max_completion_tokens": 0}),
            "invalid_value",
            "max_completion_tokens",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
            "unsupported_parameter",
            "tools",
        ),
        (json!({"prompt": "a"}), "unknown_parameter", "prompt"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
    ] {
        let request = chat_request(&four_word_chat(&rest));
        let expected = expected_error(400, code, Some(param));
        assert_eq!(http_error(&server, request).await, expected, "{rest}");
    }
}
