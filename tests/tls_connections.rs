//! Limits of connections with TLS: handshakes that stall, readers that drip, and floods of cancellations.

mod support;

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use support::frames::{Api, Frames, GO_AWAY};
use support::http::{Request, completion};
use support::tls_server::TlsServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

/// Time within which the server must act: far above the timeouts that these tests set.
const WAIT_LIMIT: Duration = Duration::from_secs(10);

fn streamed(max_tokens: u32) -> Request {
    completion(&json!({"prompt": "a", "max_tokens": max_tokens, "stream": true}))
}

/// The start of a TLS handshake: the header of a record, whose contents never follow.
const PARTIAL_HANDSHAKE: &[u8] = b"\x16\x03\x01\x02\x00";

#[tokio::test]
async fn a_handshake_that_stalls_is_ended_after_the_header_timeout() {
    let server = TlsServer::start(&["--header-timeout", "0.2"]).await;
    for address in [&server.http, &server.grpc] {
        for start in [&b""[..], PARTIAL_HANDSHAKE] {
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            stream.write_all(start).await.expect("the start is sent");
            let mut answer = Vec::new();
            let closed = timeout(WAIT_LIMIT, stream.read_to_end(&mut answer)).await;
            closed.expect("the server closes").expect("no reset");
            assert_eq!(answer, b"");
        }
    }
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_handshake() {
    let server = TlsServer::start(&["--header-timeout", "3600"]).await;
    let mut unfinished = Vec::new();
    for address in [&server.http, &server.grpc] {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let sent = stream.write_all(PARTIAL_HANDSHAKE).await;
        sent.expect("the start is sent");
        unfinished.push(stream);
        // A later connection shows that the server has accepted the earlier one.
        let client = server.authority.client().protocols(&["h2"]);
        client.connect(address).await.expect("a connection");
    }
    server.running.signal(Signal::TERM);
    let exited = timeout(WAIT_LIMIT, server.running.wait_for_exit_code()).await;
    assert_eq!(exited.expect("the server exits"), Some(0));
}

#[tokio::test]
async fn a_reader_over_tls_that_drips_is_disconnected_after_the_write_timeout() {
    let arguments = [
        "--test-runner-frequency-ms",
        "0",
        "--slow-reader-timeout",
        "3600",
        "--write-timeout",
        "0.5",
        "--slots",
        "1",
    ];
    let server = TlsServer::start(&arguments).await;
    let stream = server.authority.client().connect(&server.http).await;
    let mut stream = stream.expect("a TLS connection");
    let request = streamed(1_048_000).bytes();
    stream.write_all(&request).await.expect("the request");
    stream.flush().await.expect("the request");
    let (mut socket, _session) = stream.into_inner();
    let drip = async {
        let mut ticks = interval(Duration::from_millis(10));
        loop {
            ticks.tick().await;
            // Reading fails once the connection is closed.
            let _ = socket.read_u8().await;
        }
    };
    // The only slot becomes free when the connection is closed.
    let next = async { server.send(streamed(5)).await.read_rest().await };
    tokio::select! {
        body = timeout(WAIT_LIMIT, next) => {
            assert_eq!(body.expect("the slot becomes free").lines().len(), 5);
        }
        () = drip => unreachable!("the drip never ends"),
    }
}

#[tokio::test]
async fn a_flood_of_cancellations_over_tls_is_answered_with_enhance_your_calm() {
    let server = TlsServer::start(&[]).await;
    for (api, address) in [(Api::Http, &server.http), (Api::Grpc, &server.grpc)] {
        let client = server.authority.client().protocols(&["h2"]);
        let stream = client.connect(address).await.expect("a connection");
        let mut frames = Frames::open_on(stream, api).await;
        let cancelled = frames.encode_cancelled_requests(1, 20_000, b"{}");
        let end = frames.write_until(&cancelled, GO_AWAY).await;
        assert_eq!(
            end.error_code(),
            u32::from(h2::Reason::ENHANCE_YOUR_CALM),
            "{api:?}"
        );
    }
    let mut response = server.send(streamed(3)).await;
    assert_eq!(response.read_rest().await.lines().len(), 3);
}
