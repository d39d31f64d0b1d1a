//! HTTP/2 streams whose peers give them little room, or none.

mod support;

use std::time::Duration;

use h2::Reason;
use serde_json::{Value, json};
use support::http2::{Connection, read, reset};
use support::{Setup, full_speed, grpc};
use tokenway::runner::llm_test::TestRunnerOptions;

#[tokio::test]
async fn the_record_of_a_failed_stream_is_whole_however_small_the_window() {
    let options = TestRunnerOptions {
        fail_at: Some(2),
        ..full_speed()
    };
    let server = Setup::test_runner(options).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    for window in [1, 3, 100, 65_535] {
        let connection = Connection::open(&server.http_address(), window).await;
        let failed = read(connection.completion(&body).await).await;
        assert_eq!(failed.reset, Some(Reason::INTERNAL_ERROR));
        let text = String::from_utf8(failed.bytes).unwrap();
        assert!(text.ends_with('\n'), "window {window}: {text}");
        let record: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(record["error"]["tokens_delivered"], 2);
    }
}

#[tokio::test]
async fn a_stream_that_nobody_reads_is_reset_alone() {
    let patience = Duration::from_millis(100);
    let server = Setup::test_runner(full_speed())
        .slow_reader_timeout(patience)
        .limits(|limits| limits.write_timeout = 2 * patience)
        .start()
        .await;
    let (window, tokens) = (1_000, 10_000);
    let endless = json!({"prompt": "a", "max_tokens": 1_000_000, "stream": true});
    let body = json!({"prompt": "a", "max_tokens": tokens, "stream": true});
    let http = Connection::open(&server.http_address(), window).await;
    let (stalled, steady) = (
        http.completion(&endless).await,
        http.completion(&body).await,
    );
    let (reason, steady) = tokio::join!(reset(stalled), read(steady));
    assert_eq!((reason, steady.reset), (Reason::CANCEL, None));
    let lines = String::from_utf8(steady.bytes).unwrap();
    assert_eq!(lines.lines().count(), tokens);

    let door = Connection::open(&server.grpc_address(), window).await;
    let stalled = door.grpc_completion(&grpc::request("a", 1_000_000)).await;
    let steady = door.grpc_completion(&grpc::request("a", 10_000)).await;
    let (reason, steady) = tokio::join!(reset(stalled), read(steady));
    assert_eq!((reason, steady.reset), (Reason::CANCEL, None));
    server.drain().await.assert_nothing_is_left();
}

#[tokio::test]
async fn too_many_headers_are_a_431() {
    let server = Setup::test_runner(full_speed()).start().await;
    let connection = Connection::open(&server.http_address(), 65_535).await;
    for (headers, status) in [(100, 200), (101, 431)] {
        let named = (0..headers).map(|number| format!("x-{number}"));
        let request = named.fold(connection.get("/livez"), |request, name| {
            request.header(name, "a")
        });
        assert_eq!(connection.status(request.body(()).unwrap()).await, status);
    }
}

#[tokio::test]
async fn an_answer_before_the_body_was_read_does_not_reset_the_upload() {
    let server = Setup::test_runner(full_speed()).start().await;
    let connection = Connection::open(&server.http_address(), 65_535).await;
    let (status, is_taken) = connection.upload_to_nowhere(500_000).await;
    assert_eq!((status.as_u16(), is_taken), (404, true));
}
