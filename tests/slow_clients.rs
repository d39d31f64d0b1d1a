//! Clients that send or read a byte now and then, and so make slow but endless progress.

mod support;

use std::time::Duration;

use h2::Reason;
use prost::Message;
use serde_json::{Value, json};
use support::frames::{Api, DATA, Frames};
use support::http2::{Connection, drip_until_reset, read_body, wait_for_reset};
use support::{Setup, TestServer, full_speed, grpc, silent_at};
use tokenway::error::{Error, ErrorKind};
use tokenway::listen::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Interval, interval, timeout};
use tonic::{Code, Status};

/// Time within which the server must act: far above the timeouts that these tests set, and far below the defaults.
const WAIT_LIMIT: Duration = Duration::from_secs(5);
const SHORT_TIMEOUT: Duration = Duration::from_millis(200);
const HOUR: Duration = Duration::from_secs(3_600);

async fn server(change: impl FnOnce(&mut Limits)) -> TestServer {
    Setup::test_runner(full_speed())
        .limits(change)
        .start()
        .await
}

/// Returns the ticks at which a client sends a byte: five times slower than the minimum rate of bodies.
fn drip() -> Interval {
    interval(Duration::from_millis(10))
}

/// Sends these bytes, and then one byte at each tick, until the server closes the connection. Returns the answer.
async fn drip_until_closed(stream: TcpStream, bytes: &[u8]) -> String {
    let (mut reading, mut writing) = stream.into_split();
    let write = async {
        writing.write_all(bytes).await.expect("the bytes are sent");
        let mut ticks = drip();
        loop {
            ticks.tick().await;
            // Writing fails once the server has closed the connection.
            let _ = writing.write_all(b"a").await;
        }
    };
    let read = async {
        let mut answer = Vec::new();
        // The connection may be reset because the server does not read the latest byte.
        let _ = reading.read_to_end(&mut answer).await;
        String::from_utf8(answer).expect("the response is UTF-8")
    };
    let closed = async {
        tokio::select! {
            answer = read => answer,
            () = write => unreachable!("the drip never ends"),
        }
    };
    let closed = timeout(WAIT_LIMIT, closed).await;
    closed.expect("the server closes the connection")
}

#[tokio::test]
async fn headers_that_drip_close_the_connection() {
    let server = server(|limits| limits.header_timeout = SHORT_TIMEOUT).await;
    let head = b"GET /livez HTTP/1.1\r\nhost: a\r\nx: ";
    let first = TcpStream::connect(server.http_address()).await.unwrap();
    assert_eq!(drip_until_closed(first, head).await, "");
    let mut later = TcpStream::connect(server.http_address()).await.unwrap();
    let request = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";
    later.write_all(request).await.unwrap();
    let mut answer = String::new();
    while !answer.ends_with('}') {
        answer.push(char::from(later.read_u8().await.unwrap()));
    }
    assert_eq!(drip_until_closed(later, head).await, "");
}

#[tokio::test]
async fn a_body_that_drips_is_a_408() {
    let server = server(|limits| limits.body_timeout = SHORT_TIMEOUT).await;
    for framing in ["content-length: 4000000", "transfer-encoding: chunked"] {
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             {framing}\r\n\r\nfff\r\n"
        );
        let stream = TcpStream::connect(server.http_address()).await.unwrap();
        let answer = drip_until_closed(stream, head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 408"), "{framing}: {answer}");
        assert!(answer.contains("body_timeout"), "{framing}: {answer}");
    }
}

#[tokio::test]
async fn a_body_that_stalls_or_drips_over_http2_ends_its_request_alone() {
    let server = server(|limits| limits.body_timeout = SHORT_TIMEOUT).await;
    let http = Connection::open(&server.http_address(), 65_535).await;
    let over_grpc = Connection::open(&server.grpc_address(), 65_535).await;
    let stall: fn() -> Interval = || interval(HOUR);
    for ticks in [drip, stall] {
        let path = "/v1/completions";
        let dripped = http.drip(path, "application/json", b"{", ticks());
        let response = timeout(WAIT_LIMIT, dripped).await.expect("an answer");
        let body = String::from_utf8(response.body().clone()).expect("UTF-8");
        assert_eq!(response.status(), 408, "{body}");
        assert!(body.contains("\"code\":\"body_timeout\""), "{body}");

        let path = "/tokenway.v1.Inference/Complete";
        // The start of a message of 4,096 bytes.
        let dripped = over_grpc.drip(path, "application/grpc", b"\0\0\0\x10\0", ticks());
        let response = timeout(WAIT_LIMIT, dripped).await.expect("an answer");
        let status = Status::from_header_map(response.headers()).expect("a status");
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        assert_eq!(Error::from(&status).kind, ErrorKind::BodyTimeout);
    }
    let probe = http.get("/livez").body(()).unwrap();
    assert_eq!(http.status(probe).await, 200);
}

#[tokio::test]
async fn http2_headers_that_never_end_close_the_connection() {
    for api in [Api::Http, Api::Grpc] {
        let server = Setup::test_runner(silent_at(1))
            .limits(|limits| limits.header_timeout = SHORT_TIMEOUT)
            .start()
            .await;
        let (address, body) = match api {
            Api::Http => {
                let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
                (server.http_address(), body.to_string().into_bytes())
            }
            Api::Grpc => {
                let request = grpc::request("a", 5);
                (server.grpc_address(), request.encode_to_vec())
            }
        };
        let mut frames = Frames::open(&address, api).await;
        // Because of this stream, the connection is not idle.
        let request = frames.encode_request(1, &body);
        frames.write_until(&request, DATA).await;
        let endless = Frames::encode_endless_headers(3);
        frames.write(&endless).await.expect("the frame is sent");
        let closed = async { while frames.read_frame().await.is_some() {} };
        timeout(WAIT_LIMIT, closed)
            .await
            .expect("the server closes");
    }
}

#[tokio::test]
async fn the_end_of_a_response_that_is_not_read_in_time_is_reset() {
    let server = Setup::test_runner(full_speed())
        .limits(|limits| limits.write_timeout = Duration::from_millis(100))
        .start()
        .await;
    // The server has computed and written the whole response before the client reads the first byte.
    let body = json!({"prompt": "a", "max_tokens": 500});
    let http = Connection::open(&server.http_address(), 1).await;
    let over_grpc = Connection::open(&server.grpc_address(), 1).await;
    let stalled = [
        http.completion(&body).await,
        over_grpc.grpc_completion(&grpc::request("a", 500)).await,
    ];
    for stream in stalled {
        let reset = timeout(WAIT_LIMIT, wait_for_reset(stream)).await;
        assert_eq!(reset.expect("a reset"), Reason::CANCEL);
    }
    let dripping = http.completion(&body).await;
    let ticks = interval(Duration::from_millis(1));
    let reset = timeout(WAIT_LIMIT, drip_until_reset(dripping, ticks)).await;
    assert_eq!(reset.expect("a reset"), Reason::CANCEL);
    // A client with a small window that reads at once gets the whole response.
    let steady = Connection::open(&server.http_address(), 1_000).await;
    let read = read_body(steady.completion(&body).await).await;
    assert_eq!(read.reset, None);
    assert!(serde_json::from_slice::<Value>(&read.bytes).is_ok());
    server.drain().await.assert_all_gauges_are_zero();
}
