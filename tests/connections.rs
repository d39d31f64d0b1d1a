//! Limits of connections: timeouts of headers, bodies, idle connections and peers that read nothing, and too many
//! connections.

mod support;

use std::time::Duration;

use serde_json::json;
use support::http::{completion, get};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed, silent_at};
use tokenway::listen::Limits;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

/// Time within which the server must act: far above the timeouts that these tests set, and far below the defaults.
const WAIT_LIMIT: Duration = Duration::from_secs(5);
const SHORT_TIMEOUT: Duration = Duration::from_millis(200);

async fn server(change: impl FnOnce(&mut Limits)) -> TestServer {
    Setup::test_runner(full_speed())
        .limits(change)
        .start()
        .await
}

/// Sends these bytes, and reads until the server closes the connection. The server must do so within `WAIT_LIMIT`.
async fn send_and_read_until_closed(server: &TestServer, bytes: &[u8]) -> String {
    let connected = TcpStream::connect(server.http_address()).await;
    let mut stream = connected.expect("the server accepts connections");
    stream
        .write_all(bytes)
        .await
        .expect("the bytes are written");
    let mut answer = Vec::new();
    let closed = timeout(WAIT_LIMIT, stream.read_to_end(&mut answer)).await;
    closed
        .expect("the server closes the connection")
        .expect("the response can be read");
    String::from_utf8(answer).expect("the response is UTF-8")
}

#[tokio::test]
async fn a_connection_without_headers_is_closed() {
    let server = server(|limits| limits.header_timeout = SHORT_TIMEOUT).await;
    send_and_read_until_closed(&server, b"POST /v1/completions HTTP/1.1\r\nhost: te").await;
    send_and_read_until_closed(&server, b"").await;
}

#[tokio::test]
async fn connections_beyond_the_limit_of_both_apis_are_closed_at_once() {
    let server = server(|limits| limits.max_connections = 2).await;
    let open = [
        send_and_read_response(&server, LIVEZ_REQUEST).await,
        send_and_read_response(&server, LIVEZ_REQUEST).await,
    ];
    for address in [server.http_address(), server.grpc_address()] {
        let mut refused = TcpStream::connect(address).await.expect("a connection");
        let read = timeout(WAIT_LIMIT, refused.read(&mut [0])).await;
        assert_eq!(read.expect("the server closes").unwrap_or(0), 0);
    }
    let counts = MetricsSnapshot::take(&server);
    for listener in ["http", "grpc"] {
        let series = format!(
            "tokenway_connections_refused_total{{listener=\"{listener}\",limit=\"total\"}}"
        );
        assert_eq!(counts.get(&series), 1.0, "{}", counts.0);
    }
    drop(open);
}

#[tokio::test]
async fn a_stalled_body_closes_the_connection() {
    let server = server(|limits| limits.body_timeout = SHORT_TIMEOUT).await;
    let mut request = completion(&json!({"prompt": "a"})).bytes();
    request.pop();
    let answer = send_and_read_until_closed(&server, &request).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("body_timeout"), "{answer}");
}

#[tokio::test]
async fn a_body_slower_than_its_deadline_is_a_504() {
    let server = server(|_| ()).await;
    let request = completion(&json!({"prompt": "a"})).header("x-request-timeout", "0.1");
    let mut bytes = request.bytes();
    bytes.pop();
    let answer = send_and_read_until_closed(&server, &bytes).await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
}

const HOUR: Duration = Duration::from_secs(3_600);

/// Sends a request and reads its whole response. Returns the connection, which stays open.
async fn send_and_read_response(server: &TestServer, request: &[u8]) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server.http_address())
        .await
        .expect("the server accepts connections");
    stream
        .write_all(request)
        .await
        .expect("the request is written");
    let mut answer = String::new();
    while !answer.ends_with('}') {
        answer.push(char::from(
            stream.read_u8().await.expect("the server responds"),
        ));
    }
    (stream, answer)
}

const LIVEZ_REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";

/// Reads until the server closes the connection. The server must do so within `WAIT_LIMIT`.
async fn read_until_closed(mut stream: TcpStream) -> String {
    let mut rest = String::new();
    let closed = timeout(WAIT_LIMIT, stream.read_to_string(&mut rest)).await;
    closed
        .expect("the server closes the connection")
        .expect("the connection is not reset");
    rest
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_the_keep_alive_timeout() {
    let server = server(|limits| {
        limits.header_timeout = SHORT_TIMEOUT;
        limits.keep_alive_timeout = 4 * SHORT_TIMEOUT;
    })
    .await;
    let (stream, _) = send_and_read_response(&server, LIVEZ_REQUEST).await;
    let idle_since = Instant::now();
    assert_eq!(read_until_closed(stream).await, "");
    // The server's timer started slightly before the test read the response.
    assert!(idle_since.elapsed() > 3 * SHORT_TIMEOUT);
}

#[tokio::test]
async fn the_header_timeout_applies_to_later_requests() {
    let server = server(|limits| {
        limits.header_timeout = SHORT_TIMEOUT;
        limits.keep_alive_timeout = HOUR;
    })
    .await;
    let (mut stream, _) = send_and_read_response(&server, LIVEZ_REQUEST).await;
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nho")
        .await
        .unwrap();
    assert_eq!(read_until_closed(stream).await, "");
}

#[tokio::test]
async fn a_pipelined_partial_request_is_bound_by_the_keep_alive_timeout() {
    let server = server(|limits| {
        limits.header_timeout = HOUR;
        limits.keep_alive_timeout = SHORT_TIMEOUT;
    })
    .await;
    let whole_and_half = [LIVEZ_REQUEST, b"GET /livez HTTP/1.1\r\nho"].concat();
    let answers = send_and_read_until_closed(&server, &whole_and_half).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 1, "{answers}");
}

#[tokio::test]
async fn responses_state_the_keep_alive_timeout() {
    let server = server(|_| ()).await;
    let (_, answer) = send_and_read_response(&server, LIVEZ_REQUEST).await;
    assert!(
        answer.contains("\r\nkeep-alive: timeout=74\r\n"),
        "{answer}"
    );
    let last = b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let (_, answer) = send_and_read_response(&server, last).await;
    assert!(!answer.contains("keep-alive"), "{answer}");
}

/// HTTP/2 preface and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Sends the HTTP/2 preface and nothing else. Returns what the server sends until it closes the connection.
async fn send_preface_and_read_until_closed(server: &TestServer) -> Vec<u8> {
    let connected = TcpStream::connect(server.http_address()).await;
    let mut stream = connected.expect("the server accepts connections");
    let written = stream.write_all(PREFACE).await;
    written.expect("the preface is written");
    let mut received = Vec::new();
    let closed = timeout(WAIT_LIMIT, stream.read_to_end(&mut received)).await;
    closed
        .expect("the server closes the connection")
        .expect("the response can be read");
    received
}

#[tokio::test]
async fn an_idle_http2_connection_is_closed() {
    let server = server(|limits| limits.keep_alive_timeout = SHORT_TIMEOUT).await;
    let received = send_preface_and_read_until_closed(&server).await;
    // The GOAWAY frame has the maximum stream id: the server would still serve a request that is already on its way.
    let go_away = b"\0\0\x08\x07\0\0\0\0\0\x7f\xff\xff\xff\0\0\0\0";
    assert!(
        received
            .windows(go_away.len())
            .any(|frame| frame == go_away)
    );
}

#[tokio::test]
async fn an_http2_peer_that_ignores_pings_is_disconnected() {
    let server = server(|limits| limits.ping_interval = SHORT_TIMEOUT).await;
    send_preface_and_read_until_closed(&server).await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_partial_requests() {
    let server = server(|_| ()).await;
    let mut half = TcpStream::connect(server.http_address()).await.unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nho")
        .await
        .unwrap();
    // A response on a second connection shows that the server has accepted the first one.
    assert_eq!(get("/livez").send(&server).await.status, 200);
    timeout(WAIT_LIMIT, server.drain())
        .await
        .expect("the drain waits for nothing")
        .assert_all_gauges_are_zero();
    drop(half);
}

#[tokio::test]
async fn a_peer_that_reads_nothing_is_disconnected() {
    let server = server(|limits| limits.write_timeout = SHORT_TIMEOUT).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let address = server.http_address().parse().unwrap();
    let mut stalled = socket.connect(address).await.unwrap();
    let body = json!({"prompt": "a", "max_tokens": 1_000_000, "stream": true});
    stalled.write_all(&completion(&body).bytes()).await.unwrap();
    // The drain timeout is longer than `WAIT_LIMIT`. The drain therefore ends in time only if the server closes the
    // connection.
    timeout(WAIT_LIMIT, server.drain())
        .await
        .expect("the stalled connection is closed")
        .assert_all_gauges_are_zero();
    drop(stalled);
}

#[tokio::test]
async fn an_http_1_0_stream_that_fails_ends_with_an_error_record_and_a_reset() {
    let options = TestRunnerOptions {
        fail_at: Some(2),
        ..full_speed()
    };
    let server = Setup::test_runner(options).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let request = String::from_utf8(completion(&body).bytes()).unwrap();
    let request = request.replace("HTTP/1.1", "HTTP/1.0");
    let mut stream = TcpStream::connect(server.http_address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer).await;
    assert_eq!(
        ended.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.ends_with("\"tokens_delivered\":2,\"retryable\":false}}\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_truncated_http_1_0_stream_ends_with_a_reset() {
    let server = Setup::test_runner(silent_at(2)).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let request = String::from_utf8(completion(&body).bytes()).unwrap();
    // hyper does not notice that the connection has ended while this byte is unread.
    let request = request.replace("HTTP/1.1", "HTTP/1.0") + "x";
    let mut stream = TcpStream::connect(server.http_address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    while !answer.contains("token_1") {
        answer.push(char::from(stream.read_u8().await.unwrap()));
    }
    stream.shutdown().await.unwrap();
    let ended = stream.read_to_end(&mut Vec::new()).await;
    assert_eq!(
        ended.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn too_many_headers_are_a_431() {
    let server = server(|limits| limits.max_headers = 10).await;
    let request = (0..11).fold(get("/livez"), |request, number| {
        request.header(&format!("x-{number}"), "a")
    });
    assert_eq!(request.send(&server).await.status, 431);
}
