//! HTTP/2: small flow-control windows, unread streams, and floods of cancellations.

mod support;

use std::time::Duration;

use h2::Reason;
use http::{Request, StatusCode};
use prost::Message;
use serde_json::{Value, json};
use support::frames::{Api, DATA, Frames, GO_AWAY};
use support::http2::{Connection, read_body, wait_for_reset};
use support::{Setup, TestServer, full_speed, grpc, with_interval};
use tokenway::runner::llm_test::TestRunnerOptions;

#[tokio::test]
async fn a_failed_streams_error_record_is_complete_with_any_window_size() {
    let options = TestRunnerOptions {
        fail_at: Some(2),
        ..full_speed()
    };
    let server = Setup::test_runner(options).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    for window in [1, 3, 100, 65_535] {
        let connection = Connection::open(&server.http_address(), window).await;
        let failed = read_body(connection.completion(&body).await).await;
        assert_eq!(failed.reset, Some(Reason::INTERNAL_ERROR));
        let text = String::from_utf8(failed.bytes).unwrap();
        assert!(text.ends_with('\n'), "window {window}: {text}");
        let record: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(record["error"]["tokens_delivered"], 2);
    }
}

#[tokio::test]
async fn the_grpc_api_rejects_requests_without_its_content_type() {
    let server = Setup::test_runner(full_speed()).start().await;
    let address = server.grpc_address();
    let connection = Connection::open(&address, 65_535).await;
    for content_type in [None, Some("application/json"), Some("text/plain")] {
        let url = format!("http://{address}/tokenway.v1.Inference/ListModels");
        let request = Request::post(url);
        let request = match content_type {
            Some(content_type) => request.header("content-type", content_type),
            None => request,
        };
        let request = request.body(()).expect("the request is valid");
        let status = connection.status(request).await;
        assert_eq!(
            status,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "{content_type:?}"
        );
    }
}

#[tokio::test]
async fn an_unread_stream_is_reset_without_affecting_others() {
    let timeout = Duration::from_millis(100);
    let server = Setup::test_runner(full_speed())
        .slow_reader_timeout(timeout)
        .limits(|limits| limits.write_timeout = 2 * timeout)
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
    let (reason, steady) = tokio::join!(wait_for_reset(stalled), read_body(steady));
    assert_eq!((reason, steady.reset), (Reason::CANCEL, None));
    let lines = String::from_utf8(steady.bytes).unwrap();
    assert_eq!(lines.lines().count(), tokens);

    let grpc_connection = Connection::open(&server.grpc_address(), window).await;
    let stalled = grpc_connection
        .grpc_completion(&grpc::request("a", 1_000_000))
        .await;
    let steady = grpc_connection
        .grpc_completion(&grpc::request("a", 10_000))
        .await;
    let (reason, steady) = tokio::join!(wait_for_reset(stalled), read_body(steady));
    assert_eq!((reason, steady.reset), (Reason::CANCEL, None));
    server.drain().await.assert_all_gauges_are_zero();
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
async fn an_early_response_does_not_reset_the_upload() {
    let server = Setup::test_runner(full_speed()).start().await;
    let connection = Connection::open(&server.http_address(), 65_535).await;
    let (status, is_taken) = connection.upload_to_unknown_path(500_000).await;
    assert_eq!((status.as_u16(), is_taken), (404, true));
}

/// Returns the body of a request for `max_tokens` tokens.
fn completion_body(api: Api, max_tokens: u32) -> Vec<u8> {
    match api {
        Api::Http => json!({"prompt": "a", "max_tokens": max_tokens, "stream": true})
            .to_string()
            .into_bytes(),
        Api::Grpc => grpc::request("a", max_tokens).encode_to_vec(),
    }
}

async fn connect_frames(server: &TestServer, api: Api) -> Frames {
    let address = match api {
        Api::Http => server.http_address(),
        Api::Grpc => server.grpc_address(),
    };
    Frames::open(&address, api).await
}

/// Reads until a stream ends cleanly. Returns the number of tokens in its frames.
async fn read_token_count(frames: &mut Frames, stream: u32) -> usize {
    let mut bytes = Vec::new();
    loop {
        let frame = frames
            .read_frame()
            .await
            .expect("the connection stays open");
        assert_ne!(frame.kind, GO_AWAY, "{frame:?}");
        let is_last = frame.ends_stream(stream);
        if frame.stream == stream && frame.kind == DATA {
            bytes.extend(frame.payload);
        }
        if is_last {
            return count_tokens(&bytes);
        }
    }
}

fn count_tokens(bytes: &[u8]) -> usize {
    memchr::memmem::find_iter(bytes, b"token_").count()
}

#[tokio::test]
async fn a_thousand_cancelled_requests_affect_no_other_stream() {
    for api in [Api::Http, Api::Grpc] {
        let server = Setup::test_runner(with_interval(Duration::from_millis(2)))
            .start()
            .await;
        let mut frames = connect_frames(&server, api).await;
        let undisturbed = frames.encode_request(1, &completion_body(api, 100));
        frames.write(&undisturbed).await.unwrap();
        let first = frames.write_until(&[], DATA).await;
        assert_eq!(first.stream, 1);
        let cancelled = frames.encode_cancelled_requests(3, 1_000, &completion_body(api, 10));
        frames.write(&cancelled).await.unwrap();
        // After some clients have cancelled a stream, they reset it again for each late frame.
        let again = Frames::encode_resets(3, 1_000).repeat(20);
        frames.write(&again).await.unwrap();
        let rest = read_token_count(&mut frames, 1).await;
        assert_eq!(count_tokens(&first.payload) + rest, 100, "{api:?}");
        let later = frames.encode_request(2_003, &completion_body(api, 10));
        frames.write(&later).await.unwrap();
        assert_eq!(read_token_count(&mut frames, 2_003).await, 10, "{api:?}");
        server.drain().await.assert_all_gauges_are_zero();
    }
}

#[tokio::test]
async fn endless_cancellation_is_answered_with_enhance_your_calm() {
    for api in [Api::Http, Api::Grpc] {
        let server = Setup::test_runner(with_interval(Duration::from_millis(2)))
            .start()
            .await;
        let mut other = connect_frames(&server, api).await;
        let undisturbed = other.encode_request(1, &completion_body(api, 100));
        other.write(&undisturbed).await.unwrap();
        let mut frames = connect_frames(&server, api).await;
        // The bodies are short, so that all of them fit into the connection's flow-control window.
        let cancelled = frames.encode_cancelled_requests(1, 20_000, b"{}");
        let end = frames.write_until(&cancelled, GO_AWAY).await;
        assert_eq!(
            end.error_code(),
            u32::from(Reason::ENHANCE_YOUR_CALM),
            "{api:?}"
        );
        assert_eq!(read_token_count(&mut other, 1).await, 100, "{api:?}");
        drop(frames);
        server.drain().await.assert_all_gauges_are_zero();
    }
}
