//! Full queues, deadlines and slow readers.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{BodyEnd, completion, texts};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed, grpc, silent_at, with_interval};
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming};

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

fn error_kind(status: &Status) -> ErrorKind {
    Error::from(status).kind
}

#[tokio::test]
async fn a_full_queue_answers_429_or_resource_exhausted_and_says_when_to_retry() {
    let server = Setup::test_runner(silent_at(1))
        .slots(1)
        .queue_depth(1)
        .start()
        .await;
    let running = occupy_slot(&server).await;
    let queued = server.stream(grpc::request("a", 1)).await;
    let status = server
        .grpc()
        .await
        .complete(grpc::request("a", 1))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), error_kind(&status)),
        (Code::ResourceExhausted, ErrorKind::QueueFull)
    );
    assert!(Error::from(&status).retry_after.is_some());
    let (response, body) = completion(&json!({"prompt": "a", "stream": true}))
        .fetch(&server)
        .await;
    assert_eq!(
        (response.status, body.error().0.as_str()),
        (429, "queue_full")
    );
    assert_eq!(response.header("retry-after"), Some("1"));
    assert_eq!(response.header("retry-after-ms"), Some("1000"));
    // The earlier requests are not affected by the rejection.
    drop(running);
    assert_eq!(grpc::collect(queued).await.usage().completion_tokens, 1);
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_request_whose_deadline_expires_in_the_queue_never_reaches_the_device() {
    let server = Setup::test_runner(silent_at(1)).slots(1).start().await;
    let running = occupy_slot(&server).await;
    let mut request = Request::new(grpc::request("a", 1));
    request
        .metadata_mut()
        .insert("grpc-timeout", "50m".parse().unwrap());
    let stream = server.stream(request).await;
    let over_grpc = grpc::collect(stream).await;
    assert!(over_grpc.started.is_none());
    assert_eq!(
        over_grpc.error.expect("an error").code(),
        Code::DeadlineExceeded
    );
    let request = completion(&json!({"prompt": "a", "stream": true}));
    let (response, body) = request
        .header("x-request-timeout", "0.05")
        .fetch(&server)
        .await;
    assert_eq!(
        (response.status, body.error().0.as_str()),
        (504, "deadline_exceeded")
    );
    drop(running);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(
        counts.get("tokenway_tokens_generated_total"),
        1.0,
        "only the running request generates a token"
    );
}

#[tokio::test]
async fn a_deadline_that_expires_mid_stream_ends_the_stream_with_an_error() {
    let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
    let mut request = Request::new(grpc::request("a", 10));
    request
        .metadata_mut()
        .insert("grpc-timeout", "100m".parse().unwrap());
    let stream = server.stream(request).await;
    let over_grpc = grpc::collect(stream).await;
    assert_eq!(over_grpc.texts(0).len(), 3);
    assert_eq!(
        error_kind(&over_grpc.error.expect("an error")),
        ErrorKind::DeadlineExceeded
    );
    assert!(over_grpc.summary.is_none());

    let request = completion(&json!({"prompt": "a", "max_tokens": 10, "stream": true}));
    let (response, body) = request
        .header("x-request-timeout", "0.1")
        .fetch(&server)
        .await;
    assert_eq!((response.status, body.end), (200, BodyEnd::Unclean));
    assert_is_failed_stream(&body.lines(), 3, "deadline_exceeded");
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_failed_stream_is_counted_by_api_and_error_code() {
    let server = Setup::test_runner(silent_at(1)).slots(1).start().await;
    let mut over_grpc = Request::new(grpc::request("a", 10));
    over_grpc.set_timeout(Duration::from_millis(100));
    let stream = server.grpc().await.complete(over_grpc).await;
    let over_grpc = grpc::collect(stream.unwrap().into_inner()).await;
    assert!(over_grpc.error.is_some());
    let over_http = completion(&json!({"prompt": "a", "max_tokens": 10, "stream": true}));
    let over_http = over_http.header("x-request-timeout", "0.1");
    assert_eq!(over_http.fetch(&server).await.1.end, BodyEnd::Unclean);
    let counts = server.drain().await;
    for api in ["grpc", "http"] {
        let ended = |outcome: &str| counts.ended_requests(api, outcome);
        assert_eq!((ended("deadline_exceeded"), ended("cancelled")), (1.0, 0.0));
    }
    assert_eq!(counts.get("tokenway_cancellations_total"), 0.0);
}

/// Asserts that the lines are `tokens` tokens without a finish reason, followed by one error record.
fn assert_is_failed_stream(lines: &[Value], tokens: usize, code: &str) {
    let (last, lines) = lines.split_last().expect("an error record");
    assert_eq!(texts(lines, 0).len(), tokens);
    assert!(
        lines
            .iter()
            .all(|line| line["choices"][0]["finish_reason"].is_null())
    );
    assert_eq!(last["error"]["code"], code);
    assert_eq!(last["error"]["tokens_delivered"], tokens);
}

#[tokio::test]
async fn an_expired_deadline_is_rejected() {
    let server = Setup::test_runner(full_speed()).start().await;
    let request = completion(&json!({"prompt": "a"})).header("x-request-timeout", "0.000000001");
    let (response, body) = request.fetch(&server).await;
    assert_eq!(
        (response.status, body.error().0.as_str()),
        (504, "deadline_exceeded")
    );
    for longest in ["1e12", "1e19"] {
        let request = completion(&json!({"prompt": "a"})).header("x-request-timeout", longest);
        assert_eq!(request.fetch(&server).await.0.status, 200);
    }
    let request = completion(&json!({"prompt": "a"})).header("x-request-timeout", "-1");
    let (response, body) = request.fetch(&server).await;
    assert_eq!(response.status, 400);
    assert_eq!(
        body.error(),
        (
            "invalid_value".to_owned(),
            Some("x-request-timeout".to_owned())
        )
    );
}

#[tokio::test]
async fn a_stalled_grpc_reader_is_dropped_without_affecting_others() {
    let setup = Setup::test_runner(full_speed()).slots(2);
    let server = setup
        .slow_reader_timeout(Duration::from_millis(200))
        .start()
        .await;
    let mut stalled = occupy_slot_for_long(&server).await;
    // The sequence in the other slot continues until the stalled stream is dropped.
    let other_streams = async {
        loop {
            let other = grpc::collect(server.stream(grpc::request("a", 100_000)).await).await;
            assert_eq!(other.usage().completion_tokens, 100_000);
            if MetricsSnapshot::take(&server).get("tokenway_sequences_running") == 0.0 {
                break;
            }
        }
    };
    timeout(Duration::from_secs(30), other_streams)
        .await
        .expect("the stalled stream is dropped");
    let lingering = "tokenway_requests_lingering{api=\"grpc\"}";
    assert_eq!(MetricsSnapshot::take(&server).get(lingering), 1.0);
    // A slow client that resumes reading receives every token up to the point where its stream was dropped, and then
    // the error.
    let error = loop {
        match stalled.message().await {
            Ok(event) => assert!(event.is_some(), "the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(
        (error.code(), error_kind(&error)),
        (Code::Aborted, ErrorKind::SlowReader)
    );
    server.drain().await.assert_all_gauges_are_zero();
}

async fn occupy_slot_for_long(server: &TestServer) -> Streaming<v1::CompletionEvent> {
    let mut stream = server.stream(grpc::request("a", 1_048_000)).await;
    assert!(
        stream
            .message()
            .await
            .expect("the stream continues")
            .is_some()
    );
    stream
}

#[tokio::test]
async fn a_stalled_http_reader_gets_slow_reader_when_it_resumes() {
    let setup = Setup::test_runner(full_speed()).slots(1);
    let server = setup
        .slow_reader_timeout(Duration::from_millis(100))
        .start()
        .await;
    let body = json!({"prompt": "a", "max_tokens": 1_048_000, "stream": true});
    let mut stalled = completion(&body).send(&server).await;
    // The only slot becomes free when the stalled stream is dropped.
    let next = grpc::collect(server.stream(grpc::request("a", 5)).await).await;
    assert_eq!(next.usage().completion_tokens, 5);
    // The stalled stream is no longer in flight, although its connection is still open.
    let counts = MetricsSnapshot::take(&server);
    let gauge = |name: &str| counts.get(&format!("tokenway_requests_{name}{{api=\"http\"}}"));
    assert_eq!((gauge("in_flight"), gauge("lingering")), (0.0, 1.0));
    let rest = stalled.read_rest().await;
    assert_eq!(rest.end, BodyEnd::Unclean);
    let lines = rest.lines();
    let delivered = lines.len() - 1;
    assert_is_failed_stream(&lines, delivered, "slow_reader");
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_slow_but_steady_reader_loses_nothing() {
    let setup = Setup::test_runner(full_speed()).slots(1);
    let server = setup
        .slow_reader_timeout(Duration::from_secs(2))
        .start()
        .await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let mut stream = socket
        .connect(server.http_address().parse().unwrap())
        .await
        .expect("the server accepts connections");
    let body = json!({"prompt": "a", "max_tokens": 20_000, "stream": true});
    let request = completion(&body).header("connection", "close");
    stream.write_all(&request.bytes()).await.unwrap();
    let (mut received, mut piece) = (Vec::new(), vec![0; 16 * 1024]);
    loop {
        let read = stream.read(&mut piece).await.unwrap();
        if read == 0 {
            break;
        }
        received.extend_from_slice(&piece[..read]);
        tokio::task::yield_now().await;
    }
    let text = String::from_utf8(received).unwrap();
    assert!(
        text.contains("\"text\":\"token_19999\",\"logprobs\":null,\"finish_reason\":\"length\"")
    );
    assert_eq!(text.matches("\"text\":\"token_").count(), 20_000);
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn max_tokens_over_the_context_is_a_400_on_both_apis() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    let body = json!({"prompt": "a", "max_tokens": 1_000_000_000});
    let (response, body) = completion(&body).fetch(&server).await;
    assert_eq!(
        (response.status, body.error().0.as_str()),
        (400, "context_length_exceeded")
    );
    assert_eq!(response.header("x-should-retry"), Some("false"));
    let request = grpc::request("a", 1_000_000_000);
    let status = server.grpc().await.complete(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(error_kind(&status), ErrorKind::ContextLengthExceeded);
}

#[tokio::test]
async fn lower_priority_numbers_are_served_first() {
    let server = Setup::test_runner(silent_at(1)).slots(1).start().await;
    let running = occupy_slot(&server).await;
    let mut later = grpc::request("a", 1);
    later.priority = Some(5);
    let mut later = server.stream(later).await;
    let mut first = grpc::request("a", 100);
    first.priority = Some(-5);
    let mut first = server.stream(first).await;
    drop(running);
    // The stream that is served first keeps the slot after its first token, so the other stream gets no event.
    tokio::select! {
        biased;
        event = later.message() => panic!("the later request was served first: {event:?}"),
        event = first.message() => assert!(event.unwrap().is_some()),
    }
}
