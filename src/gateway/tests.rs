//! The HTTP API in front of a scripted engine. Tests with a paused clock advance time only when all tasks are idle.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, Version};
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt;
use tower::ServiceExt;

use serde_json::{Value, json};

use super::*;
use crate::cluster::scripted::{ScriptedStream, engine, started, summary, token};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::telemetry::Api;

/// Streams a completion of these prompts. The engine runs `script` for each prompt.
async fn stream(
    prompts: &Value,
    accept: &str,
    script: impl Fn() -> ScriptedStream + Send + Sync + 'static,
) -> Response {
    post(&json!({"prompt": prompts, "stream": true}), accept, script).await
}

/// Sends a request body. The engine runs `script` for each prompt.
async fn post(
    body: &Value,
    accept: &str,
    script: impl Fn() -> ScriptedStream + Send + Sync + 'static,
) -> Response {
    send(request(body, accept), script).await
}

fn request(body: &Value, accept: &str) -> Request<Body> {
    Request::post("/v1/completions")
        .header("content-type", "application/json")
        .header("accept", accept)
        .body(Body::from(body.to_string()))
        .expect("a request")
}

async fn send(
    request: Request<Body>,
    script: impl Fn() -> ScriptedStream + Send + Sync + 'static,
) -> Response {
    send_with(None, request, script).await
}

/// Sends a request to a gateway with this `headers_after`.
async fn send_with(
    headers_after: Option<Duration>,
    mut request: Request<Body>,
    script: impl Fn() -> ScriptedStream + Send + Sync + 'static,
) -> Response {
    let context = RequestContext::for_test(Api::Http, request.version());
    request.extensions_mut().insert(context);
    let gateway = Gateway {
        cluster: Cluster::local(engine(move |_| Ok(script())), &Telemetry::new()),
        telemetry: Telemetry::new(),
        check_accepting: Arc::new(|| Ok(())),
        stream_format: StreamFormat::Ndjson,
        unknown_fields: UnknownFieldPolicy::Refuse,
        headers_after,
        stopping: CancellationToken::new(),
        large_json: LargeJson::default(),
        operator_routes: OperatorRoutes::Metrics,
    };
    let operations = Operations {
        telemetry: Telemetry::new(),
        check_ready: Arc::new(|| Ok(())),
        worker_counts: Arc::new(|| None),
        devices: Arc::new(BTreeMap::new),
        start_drain: Arc::new(|| ()),
    };
    let router = routes(gateway, operations);
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// A completion whose tokens are all ready at once.
fn ready_tokens(tokens: u32, text: &'static str) -> ScriptedStream {
    let tokens = (0..tokens).map(move |index| token(index, text));
    let events = std::iter::once(started("m")).chain(tokens);
    // Not `tokio_stream::iter`, which yields after every 32 items.
    Box::pin(futures_util::stream::iter(events.chain([summary()])))
}

/// A completion that sends `tokens` tokens, and then neither continues nor ends.
fn stalled(tokens: u32) -> ScriptedStream {
    let tokens = (0..tokens).map(|index| token(index, "a"));
    let events = tokio_stream::iter(std::iter::once(started("m")).chain(tokens));
    Box::pin(events.chain(tokio_stream::pending()))
}

async fn next_frame(body: &mut Body) -> Option<String> {
    let frame = timeout(Duration::from_secs(3_600), body.frame()).await;
    let data = frame
        .expect("a frame within an hour")?
        .ok()?
        .into_data()
        .ok()?;
    Some(String::from_utf8(data.to_vec()).expect("lines are UTF-8"))
}

#[tokio::test]
async fn tokens_that_are_ready_together_share_frames_of_about_64_kib() {
    let response = stream(&json!("a"), "*/*", || ready_tokens(3_000, "some text")).await;
    let mut body = response.into_body();
    let (mut frames, mut lines) = (0, 0);
    while let Some(frame) = next_frame(&mut body).await {
        assert!(frame.len() < 66 * 1024, "{} bytes", frame.len());
        frames += 1;
        lines += frame.lines().count();
    }
    assert_eq!(lines, 3_000);
    assert!(frames < 20, "{frames} frames");
}

#[tokio::test]
async fn a_prompt_that_always_has_tokens_does_not_starve_the_others() {
    let response = stream(&json!(["a", "b", "c"]), "*/*", || ready_tokens(100, "x")).await;
    let mut body = response.into_body();
    let frame = next_frame(&mut body).await.expect("lines");
    let lines = frame.lines().map(serde_json::from_str::<Value>);
    let first: Vec<_> = lines
        .take(6)
        .map(|line| line.expect("JSON")["choices"][0]["index"].clone())
        .collect();
    assert_eq!(first.len(), 6);
    for choice in 0..3 {
        assert!(first.contains(&json!(choice)), "{first:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_sse_stream_sends_a_keep_alive_every_15_seconds() {
    let start = Instant::now();
    let response = stream(&json!("a"), "text/event-stream", || stalled(1)).await;
    let mut body = response.into_body();
    let first = next_frame(&mut body).await.expect("a token");
    assert!(first.starts_with("data: "), "{first}");
    for times in 1..=3 {
        let comment = next_frame(&mut body).await.expect("a comment");
        assert!(comment.starts_with(':'), "{comment}");
        assert_eq!(start.elapsed().as_secs(), 15 * times);
    }
}

#[tokio::test(start_paused = true)]
async fn the_gateway_fails_a_stream_one_second_after_its_deadline() {
    let start = Instant::now();
    let response = stream(&json!("a"), "*/*", || stalled(1)).await;
    let mut body = response.into_body();
    next_frame(&mut body).await.expect("a token");
    let record = next_frame(&mut body).await.expect("a record");
    assert!(record.contains("\"deadline_exceeded\""), "{record}");
    assert_eq!(start.elapsed().as_secs(), 61);
    // The record's last byte is a frame of its own.
    assert_eq!(next_frame(&mut body).await.as_deref(), Some("\n"));
    assert!(body.frame().await.expect("an error").is_err());
}

#[tokio::test(start_paused = true)]
async fn only_http2_delays_the_abort_that_follows_the_error_record() {
    for (version, expected) in [(Version::HTTP_11, 1_000), (Version::HTTP_2, 1_100)] {
        let mut request = request(&json!({"prompt": "a", "stream": true}), "*/*");
        // No flush ever happens on this connection, so the body waits for the flush timeout of one second.
        *request.version_mut() = version;
        let failing = || -> ScriptedStream {
            let broken = Err(tonic::Status::internal("broken"));
            Box::pin(tokio_stream::iter([started("m"), token(0, "a"), broken]))
        };
        let mut body = send(request, failing).await.into_body();
        while next_frame(&mut body).await.expect("a record") != "\n" {}
        let sent = Instant::now();
        assert!(body.frame().await.expect("an error").is_err());
        assert_eq!(sent.elapsed().as_millis(), expected, "{version:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_completion_that_does_not_start_before_the_deadline_answers_504() {
    let nothing = || -> ScriptedStream { Box::pin(tokio_stream::pending()) };
    let start = Instant::now();
    let response = stream(&json!("a"), "*/*", nothing).await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(start.elapsed().as_secs(), 61);
}

/// Streams a completion that a worker starts after `seconds`, with `headers_after` of 30 seconds.
async fn queued(seconds: u64, accept: &str) -> Response {
    let script = move || -> ScriptedStream {
        let delayed = async move {
            sleep(Duration::from_secs(seconds)).await;
            started("m")
        };
        let events = futures_util::stream::once(delayed);
        Box::pin(events.chain(tokio_stream::iter([token(0, "a"), summary()])))
    };
    let request = request(&json!({"prompt": ["a", "b"], "stream": true}), accept);
    send_with(Some(Duration::from_secs(30)), request, script).await
}

#[tokio::test(start_paused = true)]
async fn a_queued_sse_stream_sends_headers_after_30_seconds_and_then_keep_alives() {
    let start = Instant::now();
    let response = queued(55, "text/event-stream").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(start.elapsed().as_secs(), 30);
    let mut body = response.into_body();
    let comment = next_frame(&mut body).await.expect("a comment");
    assert!(
        comment.starts_with(':') && comment.ends_with("\n\n"),
        "{comment}"
    );
    assert_eq!(start.elapsed().as_secs(), 45);
    let tokens = next_frame(&mut body).await.expect("tokens");
    assert!(
        tokens.starts_with("data: ") && tokens.contains("\"text\":\"a\""),
        "{tokens}"
    );
    assert_eq!(start.elapsed().as_secs(), 55);
}

#[tokio::test(start_paused = true)]
async fn a_start_without_tokens_does_not_postpone_the_keep_alive_of_a_queued_stream() {
    let start = Instant::now();
    let script = || -> ScriptedStream {
        let delayed = async {
            sleep(Duration::from_secs(40)).await;
            started("m")
        };
        let events = futures_util::stream::once(delayed);
        Box::pin(events.chain(tokio_stream::pending()))
    };
    let request = request(&json!({"prompt": "a", "stream": true}), "text/event-stream");
    let response = send_with(Some(Duration::from_secs(30)), request, script).await;
    let mut body = response.into_body();
    let comment = next_frame(&mut body).await.expect("a comment");
    assert!(comment.starts_with(':'), "{comment}");
    assert_eq!(start.elapsed().as_secs(), 45);
}

#[tokio::test(start_paused = true)]
async fn a_queued_ndjson_stream_sends_headers_but_no_keep_alives() {
    let start = Instant::now();
    let response = queued(55, "application/x-ndjson").await;
    assert_eq!(start.elapsed().as_secs(), 30);
    let mut body = response.into_body();
    let tokens = next_frame(&mut body).await.expect("tokens");
    assert!(tokens.starts_with('{'), "{tokens}");
    assert_eq!(start.elapsed().as_secs(), 55);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_starts_before_headers_after_sends_its_headers_at_once() {
    let start = Instant::now();
    let response = queued(29, "text/event-stream").await;
    assert_eq!(start.elapsed().as_secs(), 29);
    let first = next_frame(&mut response.into_body()).await;
    assert!(first.expect("tokens").starts_with("data: "));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_passes_after_the_headers_sends_an_error_record_and_aborts() {
    let start = Instant::now();
    let mut body = queued(100, "application/x-ndjson").await.into_body();
    let record = next_frame(&mut body).await.expect("a record");
    assert_eq!(start.elapsed().as_secs(), 61);
    let object: Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!(object["error"]["code"], "deadline_exceeded");
    assert_eq!(object["error"]["tokens_delivered"], 0);
    assert_eq!(next_frame(&mut body).await.as_deref(), Some("\n"));
    assert!(body.frame().await.expect("an error").is_err());
}

#[tokio::test]
async fn an_error_in_a_stream_names_the_field_as_the_client_names_it() {
    let failing = || -> ScriptedStream {
        let error = Error::invalid_value("prompt_token_ids", "a token id is invalid");
        Box::pin(tokio_stream::iter([started("m"), Err(error.into())]))
    };
    let response = stream(&json!([[1]]), "*/*", failing).await;
    let mut body = response.into_body();
    let record = next_frame(&mut body).await.expect("a record");
    let object: Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!(object["error"]["param"], "prompt");
}

#[tokio::test(start_paused = true)]
async fn a_unary_response_never_sends_its_headers_early() {
    let nothing = || -> ScriptedStream { Box::pin(tokio_stream::pending()) };
    let start = Instant::now();
    let request = request(&json!({"prompt": "a"}), "*/*");
    let response = send_with(Some(Duration::from_secs(30)), request, nothing).await;
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(start.elapsed().as_secs(), 61);
}

/// The last message of a choice: its tokens with their log probabilities.
fn choice(choice: u32, tokens: &[(&str, f32)]) -> v1::CompletionEvent {
    let token = |(text, logprob): &(&str, f32)| v1::Token {
        text: (*text).to_owned(),
        logprobs: Some(v1::Logprobs {
            logprob: Some(*logprob),
            ..v1::Logprobs::default()
        }),
        ..v1::Token::default()
    };
    let tokens = v1::Tokens {
        choice,
        tokens: tokens.iter().map(token).collect(),
        finish_reason: v1::FinishReason::Stop.into(),
        ..v1::Tokens::default()
    };
    v1::CompletionEvent {
        event: Some(Event::Tokens(tokens)),
    }
}

#[tokio::test]
async fn the_best_candidates_have_the_highest_log_probability_per_token() {
    let script = || -> ScriptedStream {
        let candidates = [
            choice(0, &[("worst", -9.0)]),
            // Less likely than the next choice as a whole, but likelier per token.
            choice(1, &[("lo", -1.0), ("ng", -1.0), ("er", -1.0)]),
            choice(2, &[("short", -2.0)]),
        ];
        let events = std::iter::once(started("m")).chain(candidates.map(Ok));
        Box::pin(tokio_stream::iter(events.chain([summary()])))
    };
    let body = json!({"prompt": "a", "best_of": 3, "n": 2});
    let response = post(&body, "*/*", script).await;
    let body = response.into_body().collect().await.expect("a body");
    let body: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
    let choices = body["choices"].as_array().expect("choices");
    let shown: Vec<_> = choices
        .iter()
        .map(|choice| (choice["index"].clone(), choice["text"].clone()))
        .collect();
    assert_eq!(
        shown,
        [(json!(0), json!("longer")), (json!(1), json!("short"))]
    );
}
