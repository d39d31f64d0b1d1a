//! HTTP/1.1 requests whose host or whose end is ambiguous. A proxy could interpret them differently.

mod support;

use serde_json::Value;
use support::{Setup, TestServer, full_speed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

async fn connect(server: &TestServer) -> TcpStream {
    let connected = TcpStream::connect(server.http_address()).await;
    connected.expect("the server accepts connections")
}

/// Sends a request and reads until the server closes the connection. Returns the status and the body of the answer.
async fn answer_on(mut stream: TcpStream, request: &str) -> (String, String) {
    let written = stream.write_all(request.as_bytes()).await;
    written.expect("the request is written");
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer).await;
    read.expect("the answer is read to its end");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a response");
    let status = head.split(' ').nth(1).expect("a status");
    (status.to_owned(), body.to_owned())
}

/// Asserts that the server rejects a request with status 400 and closes the connection. Returns `code` and `param` of
/// the error.
async fn rejection_on(stream: TcpStream, request: &str) -> (String, Option<String>) {
    let (status, body) = answer_on(stream, request).await;
    assert_eq!(status, "400", "{request:?}");
    let body: Value = serde_json::from_str(&body).expect("an error object");
    let text = |name: &str| body["error"][name].as_str().map(str::to_owned);
    (text("code").expect("a code"), text("param"))
}

async fn assert_rejected(server: &TestServer, request: &str, code: &str, param: Option<&str>) {
    let rejection = rejection_on(connect(server).await, request).await;
    let expected = (code.to_owned(), param.map(str::to_owned));
    assert_eq!(rejection, expected, "{request:?}");
}

#[tokio::test]
async fn a_request_must_have_one_host() {
    let server = server().await;
    let (missing, invalid) = ("missing_parameter", "invalid_value");
    let none = "GET /livez HTTP/1.1\r\n\r\n";
    assert_rejected(&server, none, missing, Some("host")).await;
    let two = "GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n";
    assert_rejected(&server, two, invalid, Some("host")).await;
    let old_with_two = two.replace("HTTP/1.1", "HTTP/1.0");
    assert_rejected(&server, &old_with_two, invalid, Some("host")).await;
    let old = none.replace("HTTP/1.1", "HTTP/1.0");
    let (status, _) = answer_on(connect(&server).await, &old).await;
    assert_eq!(status, "200", "HTTP/1.0 has no Host header");
}

/// Returns a request to tokenize a text, with these further headers.
fn tokenize(headers: &str, body: &str) -> String {
    format!(
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}\r\n{body}"
    )
}

const CHUNKED_BODY: &str = "e\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n";

#[tokio::test]
async fn a_body_must_have_one_framing() {
    let server = server().await;
    for (headers, param) in [
        ("Transfer-Encoding: gzip, chunked\r\n", "transfer-encoding"),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "transfer-encoding",
        ),
        (
            "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            "content-length",
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
            "content-length",
        ),
    ] {
        let request = tokenize(headers, CHUNKED_BODY);
        assert_rejected(&server, &request, "invalid_value", Some(param)).await;
    }
    let headers = "transfer-encoding: Chunked\r\nConnection: close\r\n";
    let request = tokenize(headers, CHUNKED_BODY);
    let (status, body) = answer_on(connect(&server).await, &request).await;
    assert_eq!(status, "200", "{body}");
}

#[tokio::test]
async fn each_line_must_end_with_cr_lf() {
    let server = server().await;
    for request in [
        "GET /livez HTTP/1.1\nHost: localhost\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\n\n",
    ] {
        assert_rejected(&server, request, "invalid_value", None).await;
    }
}

#[tokio::test]
async fn later_requests_of_a_connection_are_checked_too() {
    let server = server().await;
    let mut stream = connect(&server).await;
    // The line feeds in the body are not part of a head. The body is sent after its head.
    let body = "{\n\n\"prompt\": \"a\"\n\n}";
    let head = tokenize(&format!("Content-Length: {}\r\n", body.len()), "");
    for _ in 0..2 {
        for part in [&head, body] {
            let written = stream.write_all(part.as_bytes()).await;
            written.expect("the request is written");
        }
        let mut answer = String::new();
        while !answer.ends_with('}') {
            let byte = stream.read_u8().await.expect("the server responds");
            answer.push(char::from(byte));
        }
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let request = "GET /livez HTTP/1.1\r\nHost: localhost\n\r\n";
    let (code, _) = rejection_on(stream, request).await;
    assert_eq!(code, "invalid_value");
}

#[tokio::test]
async fn malformed_header_lines_are_a_400() {
    let server = server().await;
    for header in [
        "X: a\r\n continued",
        "X : a",
        " X: a",
        "X: a\rb",
        "X: a\0b",
        "X",
        "Content-Length: 1, 1",
        "Content-Length: +1",
        "Content-Length: 1\r\nContent-Length: 2",
        "Transfer-Encoding: chunked, gzip",
    ] {
        let request = tokenize(&format!("{header}\r\n"), "");
        let (status, _) = answer_on(connect(&server).await, &request).await;
        assert_eq!(status, "400", "{request:?}");
    }
}

#[tokio::test]
async fn a_timeout_that_is_sent_twice_is_rejected() {
    let server = server().await;
    let headers = "X-Request-Timeout: 1\r\nx-request-timeout: 2\r\nConnection: close\r\nContent-Length: 0\r\n";
    let request = tokenize(headers, "");
    assert_rejected(
        &server,
        &request,
        "invalid_value",
        Some("x-request-timeout"),
    )
    .await;
}
