//! curl as a client of the HTTP API, with command lines as a user types them in a shell.

mod support;

use rustix::process::Signal;
use serde_json::Value;
use support::http::texts;
use support::program::{Outcome, Program, curl, start_server};
use support::{Setup, TestServer, full_speed};
use tokenway::runner::llm_test::TestRunnerOptions;

const STREAM: &str = r#"{"prompt": "one two", "max_tokens": 256, "stream": true}"#;
const ENDLESS: &str = r#"{"prompt": "one two", "max_tokens": 100000, "stream": true}"#;
const UNARY: &str = r#"{"prompt": "one two", "max_tokens": 3}"#;
const REJECTED: &str = r#"{"prompt": "one two", "max_tokens": -1}"#;

/// curl's exit code for an HTTP error status with `--fail`.
const HTTP_ERROR: Option<i32> = Some(22);
/// curl's exit code for a truncated body.
const PARTIAL_FILE: Option<i32> = Some(18);
/// curl's exit code for a reset HTTP/2 stream.
const HTTP2_STREAM_ERROR: Option<i32> = Some(92);

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// Starts a server on which every stream fails in place of token 10.
async fn failing_server() -> TestServer {
    let options = TestRunnerOptions {
        fail_at: Some(10),
        ..full_speed()
    };
    Setup::test_runner(options).start().await
}

/// Returns curl with a completion request that has this body.
fn curl_completion(url: &str, body: &str) -> Program {
    let program = curl().args(["--no-buffer", "--data", body]);
    let program = program.args(["--header", "content-type: application/json"]);
    program.arg(format!("{url}/v1/completions"))
}

fn expected_tokens(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("token_{index}")).collect()
}

fn parse_lines(outcome: &Outcome) -> Vec<Value> {
    let objects = outcome.stdout.lines().map(serde_json::from_str);
    objects.collect::<Result<_, _>>().expect("a line is JSON")
}

#[tokio::test]
async fn a_stream_has_one_line_per_token() {
    let server = server().await;
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let request = curl_completion(&server.http_url(), STREAM).arg(version);
        let outcome = request.run().await;
        assert_eq!(outcome.code, Some(0), "{version}: {}", outcome.stderr);
        assert_eq!(
            texts(&parse_lines(&outcome), 0),
            expected_tokens(256),
            "{version}"
        );
    }
}

#[tokio::test]
async fn an_sse_stream_has_one_event_per_token_and_done() {
    let server = server().await;
    let request = curl_completion(&server.http_url(), STREAM);
    let request = request.args(["--header", "accept: text/event-stream"]);
    let printed = request.run().await.expect_success();
    let mut events: Vec<_> = printed.split_terminator("\n\n").collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let chunks: Vec<Value> = events
        .iter()
        .map(|event| event.strip_prefix("data: ").expect("an event has data"))
        .map(|data| serde_json::from_str(data).expect("the data is JSON"))
        .collect();
    assert_eq!(texts(&chunks, 0), expected_tokens(256));
}

#[tokio::test]
async fn a_unary_response_is_one_object() {
    let server = server().await;
    let printed = curl_completion(&server.http_url(), UNARY)
        .run()
        .await
        .expect_success();
    let answer: Value = serde_json::from_str(&printed).expect("the output is JSON");
    assert_eq!(answer["choices"][0]["text"], expected_tokens(3).concat());
}

#[tokio::test]
async fn a_rejection_has_a_status_and_an_error_object() {
    let server = server().await;
    let request = curl_completion(&server.http_url(), REJECTED);
    let printed = request.args(["--write-out", "\n%{http_code}"]).run().await;
    let printed = printed.expect_success();
    let (body, status) = printed.split_once('\n').expect("a body and a status");
    let body: Value = serde_json::from_str(body).expect("the output is JSON");
    assert_eq!(status, "400");
    assert_eq!(body["error"]["code"], "invalid_value");
    assert_eq!(body["error"]["param"], "max_tokens");
}

#[tokio::test]
async fn a_rejection_fails_with_the_fail_flag() {
    let server = server().await;
    let request = curl_completion(&server.http_url(), REJECTED).arg("--fail");
    let outcome = request.run().await;
    assert_eq!(outcome.code, HTTP_ERROR, "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "");
}

#[tokio::test]
async fn a_failing_stream_has_an_error_record_and_a_failure_exit_code() {
    let server = failing_server().await;
    let request = curl_completion(&server.http_url(), STREAM).arg("--http1.1");
    let outcome = request.run().await;
    assert_eq!(outcome.code, PARTIAL_FILE, "{}", outcome.stderr);
    let mut lines = parse_lines(&outcome);
    let record = lines.pop().expect("an error record");
    assert_eq!(record["error"]["code"], "internal_error");
    assert_eq!(texts(&lines, 0), expected_tokens(10));
}

#[tokio::test]
async fn a_failing_http2_stream_has_a_failure_exit_code() {
    let server = failing_server().await;
    let request = curl_completion(&server.http_url(), STREAM).arg("--http2-prior-knowledge");
    let outcome = request.run().await;
    assert_eq!(outcome.code, HTTP2_STREAM_ERROR, "{}", outcome.stderr);
    // If curl receives the error record and the reset together, it drops the record.
    assert!(!outcome.stdout.contains("token_10"), "{}", outcome.stdout);
    assert!(!outcome.stdout.contains(r#""finish_reason":"length""#));
}

#[tokio::test]
async fn a_truncated_stream_has_a_failure_exit_code() {
    let (server, [http, _]) = start_server(&["--test-runner-frequency-ms", "1"]).await;
    let mut curl = curl_completion(&http, ENDLESS).start();
    assert!(curl.read_line().await.contains("token_0"));
    server.signal(Signal::KILL);
    assert_eq!(curl.wait_for_exit_code().await, PARTIAL_FILE);
}
