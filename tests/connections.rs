//! What a door puts up with from a connection: slow headers, slow bodies, nothing at all, and a peer
//! that takes nothing.

mod support;

use std::time::Duration;

use serde_json::json;
use support::http::{completion, get};
use support::{Setup, TestServer, full_speed, silent_at};
use tokenway::listen::Limits;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

/// Far above the limits that these tests set, and far below the defaults.
const SOON: Duration = Duration::from_secs(5);
const LIMIT: Duration = Duration::from_millis(200);

async fn server(change: impl FnOnce(&mut Limits)) -> TestServer {
    Setup::test_runner(full_speed())
        .limits(change)
        .start()
        .await
}

/// Sends these bytes, and reads what comes until the server closes.
async fn closed_soon(server: &TestServer, bytes: &[u8]) -> String {
    let connected = TcpStream::connect(server.http_address()).await;
    let mut stream = connected.expect("the door answers");
    stream.write_all(bytes).await.expect("the bytes are taken");
    let mut answer = Vec::new();
    let closed = timeout(SOON, stream.read_to_end(&mut answer)).await;
    closed
        .expect("the server closes")
        .expect("the answer can be read");
    String::from_utf8(answer).expect("an answer is UTF-8")
}

#[tokio::test]
async fn headers_that_do_not_come_close_the_connection() {
    let server = server(|limits| limits.header_timeout = LIMIT).await;
    closed_soon(&server, b"POST /v1/completions HTTP/1.1\r\nhost: te").await;
    closed_soon(&server, b"").await;
}

#[tokio::test]
async fn a_body_that_makes_no_progress_closes_the_connection() {
    let server = server(|limits| limits.body_timeout = LIMIT).await;
    let mut request = completion(&json!({"prompt": "a"})).bytes();
    request.pop();
    let answer = closed_soon(&server, &request).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn a_body_that_takes_longer_than_its_deadline_is_a_504() {
    let server = server(|_| ()).await;
    let request = completion(&json!({"prompt": "a"})).header("x-request-timeout", "0.1");
    let mut bytes = request.bytes();
    bytes.pop();
    let answer = closed_soon(&server, &bytes).await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
}

const HOUR: Duration = Duration::from_secs(3_600);

/// Asks once, and reads the answer, of which nothing is left to read then.
async fn answered_once(server: &TestServer, request: &[u8]) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server.http_address())
        .await
        .expect("it answers");
    stream.write_all(request).await.expect("it is taken");
    let mut answer = String::new();
    while !answer.ends_with('}') {
        answer.push(char::from(stream.read_u8().await.expect("an answer")));
    }
    (stream, answer)
}

const ALIVE: &[u8] = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";

/// What still comes until the server closes, which it does soon.
async fn the_end(mut stream: TcpStream) -> String {
    let mut rest = String::new();
    let closed = timeout(SOON, stream.read_to_string(&mut rest)).await;
    closed
        .expect("the server closes")
        .expect("in an orderly way");
    rest
}

#[tokio::test]
async fn an_idle_connection_lasts_for_the_keep_alive_timeout() {
    let server = server(|limits| {
        limits.header_timeout = LIMIT;
        limits.keep_alive_timeout = 4 * LIMIT;
    })
    .await;
    let (stream, _) = answered_once(&server, ALIVE).await;
    let idle_since = Instant::now();
    assert_eq!(the_end(stream).await, "");
    // The server's clock began a little before the answer was read.
    assert!(idle_since.elapsed() > 3 * LIMIT);
}

#[tokio::test]
async fn the_headers_of_a_later_request_must_come_as_soon_as_those_of_the_first() {
    let server = server(|limits| {
        limits.header_timeout = LIMIT;
        limits.keep_alive_timeout = HOUR;
    })
    .await;
    let (mut stream, _) = answered_once(&server, ALIVE).await;
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nho")
        .await
        .unwrap();
    assert_eq!(the_end(stream).await, "");
}

#[tokio::test]
async fn half_a_request_in_the_packet_of_another_may_wait_as_long_as_an_idle_connection() {
    let server = server(|limits| {
        limits.header_timeout = HOUR;
        limits.keep_alive_timeout = LIMIT;
    })
    .await;
    let whole_and_half = [ALIVE, b"GET /livez HTTP/1.1\r\nho"].concat();
    let answers = closed_soon(&server, &whole_and_half).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 1, "{answers}");
}

#[tokio::test]
async fn an_answer_says_how_long_its_connection_may_be_idle() {
    let server = server(|_| ()).await;
    let (_, answer) = answered_once(&server, ALIVE).await;
    assert!(
        answer.contains("\r\nkeep-alive: timeout=74\r\n"),
        "{answer}"
    );
    let last = b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let (_, answer) = answered_once(&server, last).await;
    assert!(!answer.contains("keep-alive"), "{answer}");
}

/// What an HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Says it, and then nothing, until the server closes.
async fn silent_http2_peer_is_closed_soon(server: &TestServer) -> Vec<u8> {
    let connected = TcpStream::connect(server.http_address()).await;
    let mut stream = connected.expect("the door answers");
    let written = stream.write_all(PREFACE).await;
    written.expect("the bytes are taken");
    let mut said = Vec::new();
    let closed = timeout(SOON, stream.read_to_end(&mut said)).await;
    closed
        .expect("the server closes")
        .expect("what it says can be read");
    said
}

#[tokio::test]
async fn an_http2_connection_without_requests_is_closed_when_it_has_been_idle_too_long() {
    let server = server(|limits| limits.keep_alive_timeout = LIMIT).await;
    let said = silent_http2_peer_is_closed_soon(&server).await;
    // A request that it sends at this moment would still be answered.
    let go_away = b"\0\0\x08\x07\0\0\0\0\0\x7f\xff\xff\xff\0\0\0\0";
    assert!(said.windows(go_away.len()).any(|frame| frame == go_away));
}

#[tokio::test]
async fn an_http2_peer_that_does_not_answer_pings_loses_its_connection() {
    let server = server(|limits| limits.ping_interval = LIMIT).await;
    silent_http2_peer_is_closed_soon(&server).await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_request_that_has_not_come() {
    let server = server(|_| ()).await;
    let mut half = TcpStream::connect(server.http_address()).await.unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nho")
        .await
        .unwrap();
    // An answer on a later connection shows that the first was accepted.
    assert_eq!(get("/livez").send(&server).await.status, 200);
    timeout(SOON, server.drain())
        .await
        .expect("nobody is waited for")
        .assert_nothing_is_left();
    drop(half);
}

#[tokio::test]
async fn a_peer_that_takes_nothing_loses_its_connection() {
    let server = server(|limits| limits.write_timeout = LIMIT).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let address = server.http_address().parse().unwrap();
    let mut stalled = socket.connect(address).await.unwrap();
    let body = json!({"prompt": "a", "max_tokens": 1_000_000, "stream": true});
    stalled.write_all(&completion(&body).bytes()).await.unwrap();
    // The drain's time-out is longer than this test may take: it ends because the connection does.
    timeout(SOON, server.drain())
        .await
        .expect("nobody is left to wait for")
        .assert_nothing_is_left();
    drop(stalled);
}

#[tokio::test]
async fn a_failed_stream_over_http_1_0_ends_with_its_record_and_a_reset() {
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
async fn a_stream_over_http_1_0_that_is_cut_off_does_not_look_whole() {
    let server = Setup::test_runner(silent_at(2)).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let request = String::from_utf8(completion(&body).bytes()).unwrap();
    // hyper, which has this byte to read, does not see the end behind it.
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
