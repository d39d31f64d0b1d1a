//! Completions over the HTTP API: logprobs, echo, `best_of`, stop conditions and continuous usage.

mod support;

use serde_json::{Value, json};
use support::http::{completion, expected_error, http_error, texts};
use support::{Setup, TestServer, full_speed};

/// Logprob of each token that the test runner emits: its probability is 1/2. `LOGPROB_OF_QUARTER` is the logprob of the token
/// with the next id.
#[expect(
    clippy::approx_constant,
    reason = "the value is -ln 2 as an f32 prints it"
)]
const LOGPROB_OF_HALF: f64 = -0.693_147_2;
const LOGPROB_OF_QUARTER: f64 = -1.386_294_4;

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

async fn unary(server: &TestServer, body: &Value) -> Value {
    let (response, answer) = completion(body).fetch(server).await;
    assert_eq!(response.status, 200, "{}", answer.text);
    answer.json()
}

async fn lines(server: &TestServer, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let (response, answer) = completion(&body).fetch(server).await;
    assert_eq!(response.status, 200, "{}", answer.text);
    answer.lines()
}

/// Concatenates the logprobs of all lines of a stream.
fn joined(lines: &[Value]) -> Value {
    let mut joined = json!({});
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let lists = lines
            .iter()
            .map(|line| &line["choices"][0]["logprobs"][name]);
        let items = lists.flat_map(|list| list.as_array().expect("a list").clone());
        joined[name] = items.collect();
    }
    joined
}

#[tokio::test]
async fn each_token_has_its_logprob_and_the_top_logprobs() {
    let server = server().await;
    let body = json!({"prompt": "a", "max_tokens": 2, "logprobs": 2});
    let expected = json!({
        "tokens": ["token_0", "token_1"],
        "token_logprobs": [LOGPROB_OF_HALF, LOGPROB_OF_HALF],
        "top_logprobs": [
            {"token_0": LOGPROB_OF_HALF, "token_1": LOGPROB_OF_QUARTER},
            {"token_1": LOGPROB_OF_HALF, "token_2": LOGPROB_OF_QUARTER},
        ],
        "text_offset": [0, 7],
    });
    let answer = unary(&server, &body).await;
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    assert_eq!(joined(&lines(&server, &body).await), expected);
}

#[tokio::test]
async fn an_echoed_prompt_is_one_line_before_each_choices_tokens() {
    let server = server().await;
    // The prompt has more tokens than one gRPC message holds.
    let body = json!({"prompt": ["é b", "c"], "echo": true, "max_tokens": 600, "n": 2});
    let tokens: Vec<_> = (0..600).map(|index| format!("token_{index}")).collect();
    let lines = lines(&server, &body).await;
    let answer = unary(&server, &body).await;
    for (choice, prompt) in [(0, "é b"), (1, "é b"), (2, "c"), (3, "c")] {
        let whole = [&[prompt.to_owned()], &tokens[..]].concat();
        assert_eq!(texts(&lines, choice), whole);
        let at = usize::try_from(choice).expect("a small number");
        assert_eq!(answer["choices"][at]["text"], whole.concat());
    }
}

#[tokio::test]
async fn a_long_echoed_prompt_is_one_line() {
    let prompt = "é ".repeat(50_000);
    let body = json!({"prompt": prompt, "echo": true, "max_tokens": 1});
    let lines = lines(&server().await, &body).await;
    assert_eq!(texts(&lines, 0), [&prompt, "token_0"]);
}

#[tokio::test]
async fn echo_with_max_tokens_0_has_no_tokens_and_a_finish_reason() {
    let server = server().await;
    let body = json!({"prompt": "a b", "echo": true, "max_tokens": 0});
    let lines = lines(&server, &body).await;
    assert_eq!(texts(&lines, 0), ["a b", ""]);
    assert_eq!(lines[1]["choices"][0]["finish_reason"], "length");
    let answer = unary(&server, &body).await;
    assert_eq!(answer["choices"][0]["text"], "a b");
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2});
    assert_eq!(answer["usage"], usage);
}

#[tokio::test]
async fn echoed_prompt_tokens_have_logprobs_except_the_first() {
    let server = server().await;
    let prompt = [json!(7), json!(8)];
    let body = json!({"prompt": prompt, "echo": true, "max_tokens": 1, "logprobs": 0});
    let expected = json!({
        "tokens": ["token_7", "token_8", "token_0"],
        "token_logprobs": [null, LOGPROB_OF_HALF, LOGPROB_OF_HALF],
        "top_logprobs": [null, {"token_8": LOGPROB_OF_HALF}, {"token_0": LOGPROB_OF_HALF}],
        "text_offset": [0, 7, 14],
    });
    let answer = unary(&server, &body).await;
    assert_eq!(answer["choices"][0]["text"], "token_7token_8token_0");
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    let lines = lines(&server, &body).await;
    assert_eq!(texts(&lines, 0), ["token_7token_8", "token_0"]);
    assert_eq!(joined(&lines), expected);
}

#[tokio::test]
async fn best_of_returns_the_best_choices_and_counts_all() {
    let server = server().await;
    let body = json!({"prompt": ["a", "b c"], "max_tokens": 3, "best_of": 4, "n": 2});
    let answer = unary(&server, &body).await;
    let choices = answer["choices"].as_array().expect("choices");
    let indices: Vec<_> = choices
        .iter()
        .map(|choice| choice["index"].clone())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["logprobs"].is_null()));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27});
    assert_eq!(answer["usage"], usage);
}

#[tokio::test]
async fn an_oversized_unary_response_is_rejected_and_a_stream_is_not() {
    let server = server().await;
    let body = json!({"prompt": "a", "max_tokens": 200_000, "logprobs": 5});
    let expected = expected_error(400, "invalid_value", Some("stream"));
    assert_eq!(http_error(&server, completion(&body)).await, expected);
    let body = json!({"prompt": "a", "max_tokens": 200_000, "logprobs": 5, "stream": true});
    let (response, answer) = completion(&body).fetch(&server).await;
    assert_eq!((response.status, answer.lines().len()), (200, 200_000));
}

#[tokio::test]
async fn an_echo_that_would_be_too_large_is_rejected() {
    let server = server().await;
    let prompt = "a ".repeat(28_400);
    for stream in [false, true] {
        let body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0, "n": 128,
            "stream": stream});
        let expected = expected_error(400, "invalid_value", Some("echo"));
        assert_eq!(http_error(&server, completion(&body)).await, expected);
    }
    let ids = vec![7; 900_000];
    let body = json!({"prompt": ids, "echo": true, "max_tokens": 0, "n": 16});
    let expected = expected_error(400, "invalid_value", Some("echo"));
    assert_eq!(http_error(&server, completion(&body)).await, expected);
}

#[tokio::test]
async fn stop_tokens_and_min_tokens_are_forwarded() {
    let server = server().await;
    let body = json!({"prompt": "a", "max_tokens": 9, "stop_token_ids": [3], "min_tokens": 2});
    let answer = unary(&server, &body).await;
    assert_eq!(answer["choices"][0]["text"], "token_0token_1token_2");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let mut shown = body.clone();
    shown["include_stop_str_in_output"] = json!(true);
    let answer = unary(&server, &shown).await;
    assert_eq!(answer["choices"][0]["text"], "token_0token_1token_2token_3");
    let mut late = body;
    late["min_tokens"] = json!(6);
    let answer = unary(&server, &late).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn continuous_usage_stats_puts_usage_on_every_line() {
    let options = json!({"continuous_usage_stats": true, "include_usage": true});
    let body = json!({"prompt": "a b", "max_tokens": 3, "stream_options": options, "n": 2});
    let lines = lines(&server().await, &body).await;
    let usage = |completion: u32| {
        json!({"prompt_tokens": 2, "completion_tokens": completion,
            "total_tokens": 2 + completion})
    };
    let so_far: Vec<_> = lines.iter().map(|line| line["usage"].clone()).collect();
    let mut expected: Vec<_> = (1..=6).map(usage).collect();
    expected.push(usage(6));
    assert_eq!(so_far, expected);
}
