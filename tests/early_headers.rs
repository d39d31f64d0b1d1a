//! Early response headers: a streamed request gets its headers while it waits in the queue, before a proxy's timeout
//! for headers expires.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{BodyEnd, Request, Response, completion, expected_error, http_error};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, grpc, silent_at};
use tokenway::proto::v1;
use tokio::time::timeout;
use tonic::Streaming;

const HEADERS_AFTER: Duration = Duration::from_millis(50);

/// Returns the setup of a server with one slot. Every sequence stops after its first token but keeps the slot.
fn one_slot_setup() -> Setup {
    Setup::test_runner(silent_at(1)).slots(1)
}

/// Starts a stream that occupies the server's only slot.
async fn occupy_slot(server: &TestServer) -> Streaming<v1::CompletionEvent> {
    let mut stream = server.stream(grpc::request("a", 100)).await;
    assert!(
        stream
            .message()
            .await
            .expect("the stream continues")
            .is_some()
    );
    stream
}

fn stream_request(prompt: &Value, accept: &str) -> Request {
    completion(&json!({"prompt": prompt, "max_tokens": 1, "stream": true})).accept(accept)
}

/// Waits until a metric of the server has this value.
async fn wait_for_metric(server: &TestServer, metric: &str, value: f64) {
    let reached = async {
        while MetricsSnapshot::take(server).get(metric) != value {
            tokio::task::yield_now().await;
        }
    };
    let reached = timeout(Duration::from_secs(10), reached).await;
    assert!(
        reached.is_ok(),
        "{metric}: {}",
        MetricsSnapshot::take(server).0
    );
}

fn assert_stream_headers(response: &Response, content_type: &str) {
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), Some(content_type));
    assert_eq!(response.header("vary"), Some("accept"));
    assert_eq!(response.header("x-accel-buffering"), Some("no"));
    assert_eq!(
        response.header("cache-control"),
        Some("no-cache, no-transform")
    );
    assert_eq!(response.header("x-ignored-fields"), None);
}

#[tokio::test]
async fn a_queued_stream_gets_early_headers_and_then_its_tokens() {
    let engine = one_slot_setup().headers_after(HEADERS_AFTER).start().await;
    let gateway = Setup::gateway(&[&engine]).headers_after(HEADERS_AFTER);
    let gateway = gateway.start().await;
    for server in [&engine, &gateway] {
        for (accept, content_type) in [
            ("application/x-ndjson", "application/x-ndjson"),
            ("text/event-stream", "text/event-stream; charset=utf-8"),
        ] {
            let running = occupy_slot(&engine).await;
            let mut response = stream_request(&json!("a"), accept).send(server).await;
            assert_stream_headers(&response, content_type);
            drop(running);
            let line = response.read_line().await.expect("a token");
            let line: Value =
                serde_json::from_str(line.trim_start_matches("data: ")).expect("JSON");
            assert_eq!(line["model"], "llm_test");
            assert_eq!(line["choices"][0]["text"], "token_0");
            assert_eq!(line["choices"][0]["finish_reason"], "length");
            assert_eq!(response.read_rest().await.end, BodyEnd::Clean);
        }
    }
}

#[tokio::test]
async fn a_queued_list_of_prompts_gets_early_headers() {
    let server = one_slot_setup().headers_after(HEADERS_AFTER).start().await;
    let running = occupy_slot(&server).await;
    let prompts = json!(["a", "b", "c"]);
    let mut response = stream_request(&prompts, "application/x-ndjson")
        .send(&server)
        .await;
    assert_eq!(response.status, 200);
    drop(running);
    let body = response.read_rest().await;
    assert_eq!((body.lines().len(), body.end), (3, BodyEnd::Clean));
}

#[tokio::test]
async fn an_error_after_the_headers_is_an_error_record_and_an_unclean_end() {
    let server = one_slot_setup().headers_after(HEADERS_AFTER).start().await;
    let running = occupy_slot(&server).await;
    for (accept, prefix) in [
        ("application/x-ndjson", ""),
        ("text/event-stream", "data: "),
    ] {
        let request = stream_request(&json!("a"), accept).header("x-request-timeout", "0.5");
        let (response, body) = request.fetch(&server).await;
        assert_eq!((response.status, body.end), (200, BodyEnd::Unclean));
        let record = body.text.strip_prefix(prefix).expect("an error record");
        let record: Value = serde_json::from_str(record).expect("JSON");
        assert_eq!(record["error"]["code"], "deadline_exceeded", "{record}");
        assert_eq!(record["error"]["tokens_delivered"], 0);
    }
    drop(running);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    let failed = counts.ended_requests("http", "deadline_exceeded");
    assert_eq!(failed, 2.0, "{}", counts.0);
    // An error after the response headers does not count as a rejected request.
    let rejected = "tokenway_requests_rejected_total{api=\"http\",reason=\"deadline_exceeded\"}";
    assert_eq!(counts.get(rejected), 0.0, "{}", counts.0);
}

#[tokio::test]
async fn a_queued_stream_reports_draining_after_its_headers() {
    let setup = one_slot_setup().headers_after(HEADERS_AFTER);
    let setup = setup.drain(Duration::ZERO, Duration::from_millis(100));
    let server = setup.start().await;
    let _running = occupy_slot(&server).await;
    let mut response = stream_request(&json!("a"), "*/*").send(&server).await;
    assert_eq!(response.status, 200);
    let draining = tokio::spawn(server.drain());
    let body = response.read_rest().await;
    assert_eq!(body.end, BodyEnd::Unclean);
    assert_eq!(body.json()["error"]["code"], "draining");
    draining
        .await
        .expect("the task does not panic")
        .assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_client_that_disconnects_after_early_headers_leaves_the_queue() {
    let server = one_slot_setup().headers_after(HEADERS_AFTER).start().await;
    let running = occupy_slot(&server).await;
    let response = stream_request(&json!("a"), "text/event-stream")
        .send(&server)
        .await;
    assert_eq!(response.status, 200);
    assert_eq!(
        MetricsSnapshot::take(&server).get("tokenway_requests_queued"),
        1.0
    );
    drop(response);
    wait_for_metric(&server, "tokenway_cancellations_total", 1.0).await;
    wait_for_metric(&server, "tokenway_requests_queued", 0.0).await;
    drop(running);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(
        counts.ended_requests("http", "cancelled"),
        1.0,
        "{}",
        counts.0
    );
    // Only the request in the slot has generated a token.
    assert_eq!(counts.get("tokenway_tokens_generated_total"), 1.0);
}

#[tokio::test]
async fn immediate_rejections_and_unary_requests_keep_their_status() {
    let server = one_slot_setup()
        .queue_depth(1)
        .headers_after(Duration::from_millis(1));
    let server = server.start().await;
    let running = occupy_slot(&server).await;
    let unary = completion(&json!({"prompt": "a"})).header("x-request-timeout", "0.2");
    let expected = expected_error(504, "deadline_exceeded", None);
    assert_eq!(http_error(&server, unary).await, expected);
    let too_long = completion(&json!({"prompt": "a", "max_tokens": 2_000_000, "stream": true}));
    let expected = expected_error(400, "context_length_exceeded", Some("max_tokens"));
    assert_eq!(http_error(&server, too_long).await, expected);
    let queued = server.stream(grpc::request("a", 1)).await;
    let expected = expected_error(429, "queue_full", None);
    assert_eq!(
        http_error(&server, stream_request(&json!("a"), "*/*")).await,
        expected
    );
    drop((running, queued));
}
