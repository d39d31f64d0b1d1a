//! Faults planted in a server, as `tokenway-perf streaming` reports them.

use serde_json::{Value, json};
use support::grpc::{PlantedGrpcServer, StreamEnd};
use support::planted::{PlantedServer, Response, token_record};
use support::{RunOutput, WRONG_ORDERS, perf_command, run, split_words};

mod support;

/// Streams four tokens at full speed through the given API.
fn run_streaming(arguments: &str) -> RunOutput {
    let options = "--tokens 4 --interval-ms 0 --max-overhead-ms 60000";
    run(perf_command(split_words(&format!(
        "streaming {options} {arguments}"
    ))))
}

fn stream_over_http(server: &PlantedServer) -> RunOutput {
    run_streaming(&format!("--http {}", server.url()))
}

fn unfinished_tokens(count: u32) -> Vec<String> {
    let records = (0..count).map(|index| token_record(index, false, None));
    records.collect()
}

fn stream_over_grpc(indices: &'static [u32], end: StreamEnd) -> RunOutput {
    let server = PlantedGrpcServer::streaming(indices, end);
    run_streaming(&format!("--grpc {}", server.address()))
}

#[test]
fn the_request_asks_for_lines_with_stamps() {
    let server = PlantedServer::streaming(&[0, 1, 2, 3]);
    run_streaming(&format!("--http {}/base/ --model m", server.url())).assert_succeeded();
    let requests = server.requests();
    let (head, body) = requests[0].split_once("\r\n\r\n").expect("a head");
    let line = "POST /base/v1/completions HTTP/1.1\r\n";
    assert!(head.starts_with(line), "{head}");
    assert!(head.contains("\r\naccept: application/x-ndjson"), "{head}");
    let body: Value = serde_json::from_str(body).expect("JSON");
    let expected = json!({
        "model": "m", "prompt": body["prompt"], "max_tokens": 4, "stream": true,
        "stream_options": {"include_stamps": true},
    });
    assert_eq!(body, expected);
}

#[test]
fn a_server_without_stamps_is_measured_without_one_way_latency() {
    let ran = stream_over_http(&PlantedServer::streaming(&[0, 1, 2, 3]));
    ran.assert_succeeded();
    let metrics = "StreamingMetrics(received_tokens=4, ";
    assert!(ran.out.contains(metrics), "{ran}");
    let unknown = "\nOne-way latency: unknown, the server sends no timestamps\n";
    assert!(ran.out.ends_with(unknown), "{ran}");
}

#[test]
fn tokens_in_a_wrong_order_are_classified() {
    for (indices, reason) in WRONG_ORDERS {
        stream_over_http(&PlantedServer::streaming(indices))
            .assert_failed(&format!("HTTP: {reason}"));
        stream_over_grpc(indices, StreamEnd::Summary).assert_failed(&format!("gRPC: {reason}"));
    }
}

#[test]
fn a_body_without_its_last_chunk_is_broken() {
    let records = (0..4).map(|index| token_record(index, index == 3, None));
    let server = PlantedServer::sending(records.collect(), Response::close);
    let ran = stream_over_http(&server);
    assert_eq!((ran.code, ran.err.lines().count()), (Some(1), 1), "{ran}");
    let reason = "error: HTTP: the stream broke after 4 tokens: ";
    assert!(ran.err.starts_with(reason), "{ran}");
}

#[test]
fn a_body_without_a_finish_reason_is_cut_off() {
    let server = PlantedServer::sending(unfinished_tokens(4), Response::write_last_chunk);
    let reason = "HTTP: the stream ended after 4 tokens without a finish_reason";
    stream_over_http(&server).assert_failed(reason);
}

#[test]
fn a_stream_of_events_without_its_summary_is_cut_off() {
    let reason = "gRPC: the stream ended after 4 tokens without its summary";
    stream_over_grpc(&[0, 1, 2, 3], StreamEnd::Missing).assert_failed(reason);
}

#[test]
fn an_error_in_the_stream_is_reported_with_its_place_on_both_apis() {
    let mut records = unfinished_tokens(2);
    records.push(json!({"error": {"message": "planted", "code": "worker_lost"}}).to_string());
    let server = PlantedServer::sending(records, Response::close);
    let reason = "the stream ended with an error after 2 tokens:";
    stream_over_http(&server).assert_failed(&format!("HTTP: {reason} planted (worker_lost)"));
    let ran = stream_over_grpc(&[0, 1], StreamEnd::Error);
    let reason = format!("error: gRPC: {reason} Internal: planted");
    assert!(ran.err.starts_with(&reason), "{ran}");
}

#[test]
fn a_response_in_another_format_is_refused() {
    let body = "data: [DONE]\n\n";
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length:";
    let response = format!("{head} {}\r\n\r\n{body}", body.len());
    let reason = "HTTP: expected application/x-ndjson, got 'text/event-stream'";
    stream_over_http(&PlantedServer::answering(response)).assert_failed(reason);
}

#[test]
fn a_token_of_another_model_is_refused() {
    let record = json!({"choices": [{"text": " Paris", "finish_reason": null}]}).to_string();
    let server = PlantedServer::sending(vec![record], Response::write_last_chunk);
    let reason = "HTTP: expected a token of the test runner, got \" Paris\"";
    stream_over_http(&server).assert_failed(reason);
}
