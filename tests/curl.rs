//! What curl makes of the HTTP door, by the commands that a shell would be given.

mod support;

use rustix::process::Signal;
use serde_json::Value;
use support::http::texts;
use support::program::{Outcome, Program, curl, serving};
use support::{Setup, TestServer, full_speed};
use tokenway::runner::llm_test::TestRunnerOptions;

const STREAM: &str = r#"{"prompt": "one two", "max_tokens": 256, "stream": true}"#;
const ENDLESS: &str = r#"{"prompt": "one two", "max_tokens": 100000, "stream": true}"#;
const UNARY: &str = r#"{"prompt": "one two", "max_tokens": 3}"#;
const REFUSED: &str = r#"{"prompt": "one two", "max_tokens": -1}"#;

/// What curl exits with where a server says that a transfer failed, and `--fail` was asked for.
const HTTP_ERROR: Option<i32> = Some(22);
/// … where a body ends before its end.
const PARTIAL_FILE: Option<i32> = Some(18);
/// … where an HTTP/2 stream is reset.
const HTTP2_STREAM_ERROR: Option<i32> = Some(92);

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// A server whose every stream fails in the place of token 10.
async fn failing_server() -> TestServer {
    let options = TestRunnerOptions {
        fail_at: Some(10),
        ..full_speed()
    };
    Setup::test_runner(options).start().await
}

/// Asks for a completion with this body.
fn completion(url: &str, body: &str) -> Program {
    let program = curl().args(["--no-buffer", "--data", body]);
    let program = program.args(["--header", "content-type: application/json"]);
    program.arg(format!("{url}/v1/completions"))
}

fn tokens(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("token_{index}")).collect()
}

fn lines(outcome: &Outcome) -> Vec<Value> {
    let objects = outcome.stdout.lines().map(serde_json::from_str);
    objects.collect::<Result<_, _>>().expect("a line is JSON")
}

#[tokio::test]
async fn a_stream_is_a_line_for_each_token() {
    let server = server().await;
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let asked = completion(&server.http_url(), STREAM).arg(version);
        let outcome = asked.run().await;
        assert_eq!(outcome.code, Some(0), "{version}: {}", outcome.stderr);
        assert_eq!(texts(&lines(&outcome), 0), tokens(256), "{version}");
    }
}

#[tokio::test]
async fn a_stream_of_events_is_an_event_for_each_token_and_its_end() {
    let server = server().await;
    let asked = completion(&server.http_url(), STREAM);
    let asked = asked.args(["--header", "accept: text/event-stream"]);
    let printed = asked.run().await.success();
    let mut events: Vec<_> = printed.split_terminator("\n\n").collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let chunks: Vec<Value> = events
        .iter()
        .map(|event| event.strip_prefix("data: ").expect("an event has data"))
        .map(|data| serde_json::from_str(data).expect("the data is JSON"))
        .collect();
    assert_eq!(texts(&chunks, 0), tokens(256));
}

#[tokio::test]
async fn without_a_stream_the_answer_is_one_object() {
    let server = server().await;
    let printed = completion(&server.http_url(), UNARY).run().await.success();
    let answer: Value = serde_json::from_str(&printed).expect("it is JSON");
    assert_eq!(answer["choices"][0]["text"], tokens(3).concat());
}

#[tokio::test]
async fn a_refusal_has_its_status_and_an_object_that_says_why() {
    let server = server().await;
    let asked = completion(&server.http_url(), REFUSED);
    let printed = asked.args(["--write-out", "\n%{http_code}"]).run().await;
    let printed = printed.success();
    let (body, status) = printed.split_once('\n').expect("a body and a status");
    let body: Value = serde_json::from_str(body).expect("it is JSON");
    assert_eq!(status, "400");
    assert_eq!(body["error"]["code"], "invalid_value");
    assert_eq!(body["error"]["param"], "max_tokens");
}

#[tokio::test]
async fn a_refusal_is_a_failure_where_that_is_asked_for() {
    let server = server().await;
    let refused = completion(&server.http_url(), REFUSED).arg("--fail");
    let outcome = refused.run().await;
    assert_eq!(outcome.code, HTTP_ERROR, "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "");
}

#[tokio::test]
async fn a_stream_that_fails_has_an_error_record_and_a_failure() {
    let server = failing_server().await;
    let asked = completion(&server.http_url(), STREAM).arg("--http1.1");
    let outcome = asked.run().await;
    assert_eq!(outcome.code, PARTIAL_FILE, "{}", outcome.stderr);
    let mut lines = lines(&outcome);
    let record = lines.pop().expect("a record");
    assert_eq!(record["error"]["code"], "internal_error");
    assert_eq!(texts(&lines, 0), tokens(10));
}

#[tokio::test]
async fn a_stream_over_http2_that_fails_is_a_failure() {
    let server = failing_server().await;
    let asked = completion(&server.http_url(), STREAM).arg("--http2-prior-knowledge");
    let outcome = asked.run().await;
    assert_eq!(outcome.code, HTTP2_STREAM_ERROR, "{}", outcome.stderr);
    // On a busy machine curl may see the record and the reset at once; then it drops the record.
    assert!(!outcome.stdout.contains("token_10"), "{}", outcome.stdout);
    assert!(!outcome.stdout.contains(r#""finish_reason":"length""#));
}

#[tokio::test]
async fn a_stream_that_is_cut_is_a_failure() {
    let (server, [http, _]) = serving(&["--test-runner-frequency-ms", "1"]).await;
    let mut curl = completion(&http, ENDLESS).start();
    assert!(curl.line().await.contains("token_0"));
    server.signal(Signal::KILL);
    assert_eq!(curl.end().await, PARTIAL_FILE);
}
