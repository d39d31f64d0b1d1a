//! A client that disconnects frees its slot at once, in every state of its request.
//!
//! Each server has only one slot. A completion that finishes afterwards shows that the slot is free.

mod support;

use std::time::Duration;

use serde_json::json;
use support::http::{Response, completion};
use support::{Setup, TestServer, grpc, silent_at, with_interval};
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

async fn start_http_stream(server: &TestServer, max_tokens: u32) -> Response {
    let body = json!({"prompt": "a", "max_tokens": max_tokens, "stream": true});
    completion(&body).send(server).await
}

/// Asserts that the only slot is free, by running a completion of this many tokens.
async fn assert_slot_is_free(server: &TestServer, tokens: u32) {
    let completion = grpc::collect(server.stream(grpc::request("a", tokens)).await).await;
    assert_eq!(completion.usage().completion_tokens, tokens);
}

async fn assert_one_cancellation(server: TestServer, api: &str) {
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.ended_requests(api, "cancelled"), 1.0, "{}", counts.0);
    assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
}

#[tokio::test]
async fn a_client_that_disconnects_mid_stream_frees_its_slot() {
    for api in ["http", "grpc"] {
        let runner = with_interval(Duration::from_millis(1));
        let server = Setup::test_runner(runner).slots(1).start().await;
        if api == "http" {
            let mut stream = start_http_stream(&server, 100_000).await;
            assert!(stream.read_line().await.is_some());
        } else {
            let mut stream = server.stream(grpc::request("a", 100_000)).await;
            assert!(stream.message().await.unwrap().is_some());
        }
        assert_slot_is_free(&server, 3).await;
        assert_one_cancellation(server, api).await;
    }
}

#[tokio::test]
async fn a_client_that_disconnects_between_tokens_frees_its_slot() {
    for api in ["http", "grpc"] {
        let server = Setup::test_runner(silent_at(2)).slots(1).start().await;
        if api == "http" {
            let mut stream = start_http_stream(&server, 10).await;
            assert!(stream.read_line().await.is_some());
            assert!(stream.read_line().await.is_some());
        } else {
            let mut stream = server.stream(grpc::request("a", 10)).await;
            let mut completion = grpc::Completion::default();
            while completion.choices.is_empty() || completion.choices[0].tokens.len() < 2 {
                completion.add_event(stream.message().await.unwrap().expect("two tokens"));
            }
        }
        assert_slot_is_free(&server, 2).await;
        assert_one_cancellation(server, api).await;
    }
}

#[tokio::test]
async fn a_client_that_disconnects_with_pipelined_bytes_frees_its_slot() {
    // Long timeouts: only the end of the connection can wake the task of the connection.
    let setup = Setup::test_runner(silent_at(2)).limits(|limits| {
        limits.header_timeout = Duration::from_secs(3_600);
        limits.keep_alive_timeout = Duration::from_secs(3_600);
    });
    let server = setup.slots(1).start().await;
    let body = json!({"prompt": "a", "max_tokens": 10, "stream": true});
    let mut bytes = completion(&body).bytes();
    bytes.extend_from_slice(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let mut stream = TcpStream::connect(server.http_address()).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut response = Response::read_head(stream).await;
    assert!(response.read_line().await.is_some());
    assert!(response.read_line().await.is_some());
    drop(response);
    assert_slot_is_free(&server, 2).await;
    assert_one_cancellation(server, "http").await;
}

#[tokio::test]
async fn a_client_that_disconnects_after_many_pipelined_requests_does_not_stay_queued() {
    let setup = Setup::test_runner(silent_at(2)).limits(|limits| {
        limits.header_timeout = Duration::from_secs(3_600);
        limits.keep_alive_timeout = Duration::from_secs(3_600);
    });
    let server = setup.slots(1).start().await;
    let mut running = start_http_stream(&server, 10).await;
    assert!(running.read_line().await.is_some());
    // More bytes than hyper reads at once. hyper does not notice that the connection has ended while bytes are
    // unread.
    let health_check = support::http::get("/livez").bytes();
    let body = json!({"prompt": "a", "max_tokens": 10, "stream": true});
    let bytes = [
        &health_check.repeat(20)[..],
        &completion(&body).bytes(),
        &health_check,
    ]
    .concat();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(server.http_address()).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answers = Vec::new();
        let ended = timeout(Duration::from_secs(10), stream.read_to_end(&mut answers)).await;
        ended.expect("the connection ends").unwrap();
    }
    drop(running);
    assert_slot_is_free(&server, 2).await;
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_client_that_disconnects_during_prefill_frees_its_slot() {
    // The first token takes an hour, so both requests are still in prefill when they are dropped.
    let options = TestRunnerOptions {
        first_token_delay: Duration::from_secs(3_600),
        ..support::full_speed()
    };
    let server = Setup::test_runner(options).slots(1).start().await;
    let mut stream = server.stream(grpc::request("a", 10)).await;
    let event = stream.message().await.unwrap().expect("a `started` event");
    assert!(matches!(
        event.event,
        Some(v1::completion_event::Event::Started(_))
    ));
    drop(stream);
    let mut next = server.stream(grpc::request("a", 10)).await;
    let event = next.message().await.unwrap().expect("a `started` event");
    assert!(matches!(
        event.event,
        Some(v1::completion_event::Event::Started(_))
    ));
    drop(next);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.get("tokenway_cancellations_total"), 2.0);
}

#[tokio::test]
async fn a_client_that_disconnects_while_queued_never_reaches_the_device() {
    let server = Setup::test_runner(silent_at(1)).slots(1).start().await;
    let mut running = server.stream(grpc::request("a", 2)).await;
    assert!(running.message().await.unwrap().is_some());
    // `stream` returns once the request is in the queue.
    let queued = server.stream(grpc::request("a", 1)).await;
    drop(queued);
    let next = server.stream(grpc::request("a", 1)).await;
    drop(running);
    let completion = grpc::collect(next).await;
    assert_eq!(completion.usage().completion_tokens, 1);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(
        counts.get("tokenway_tokens_generated_total"),
        2.0,
        "only the first and the last request generate tokens"
    );
}

#[tokio::test]
async fn a_stop_string_frees_the_slot() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .slots(1)
        .start()
        .await;
    let mut request = grpc::request("a", 1_000_000);
    request.stop = vec!["token_2".to_owned()];
    let stream = server.stream(request).await;
    let completion = grpc::collect(stream).await;
    assert_eq!(completion.texts(0), ["token_0", "token_1"]);
    assert_eq!(completion.usage().completion_tokens, 3);
    assert_slot_is_free(&server, 3).await;
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_disconnect_with_several_prompts_counts_as_one_cancellation() {
    let server = Setup::test_runner(silent_at(1)).slots(2).start().await;
    let body = json!({"prompt": ["a", "b"], "max_tokens": 10, "stream": true});
    let mut stream = completion(&body).send(&server).await;
    assert!(stream.read_line().await.is_some());
    drop(stream);
    assert_slot_is_free(&server, 1).await;
    assert_one_cancellation(server, "http").await;
}

#[tokio::test]
async fn a_rejected_list_of_prompts_counts_no_cancellation() {
    let server = Setup::test_runner(silent_at(1)).slots(1).queue_depth(0);
    let server = server.start().await;
    let body = json!({"prompt": ["a", "b"], "max_tokens": 10, "stream": true});
    let (response, body) = completion(&body).fetch(&server).await;
    assert_eq!(
        (response.status, body.error().0.as_str()),
        (429, "queue_full")
    );
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.get("tokenway_cancellations_total"), 0.0);
}
