//! Clients that send invalid data or nothing at all, and checks of the server's answers.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use prost::Message;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use socket2::SockRef;
use tokenway::error::{Error, ErrorKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::client::Server;
use super::readers::random_protocol;
use super::tally::End;
use crate::fault::Fault;
use crate::stream::{
    CompletionRequest, Connection, Protocol, connect, failed_status, grpc_request, reset_on_close,
};

/// Maximum time that a client without a request stays connected.
const MAX_STAY: Duration = Duration::from_millis(100);
/// Time by which a server may exceed its timeouts on a busy machine.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);
/// Number of tokens that exceeds the context of every model.
const TOO_MANY_TOKENS: u32 = 1_000_000_000;
/// Request bodies that the server must reject, each with the expected error.
const BAD_BODIES: [(&[u8], ErrorKind); 8] = [
    (br#"{"prompt":"#, ErrorKind::InvalidJson),
    (b"\xff\xfe{}", ErrorKind::InvalidJson),
    (b"{}", ErrorKind::MissingParameter),
    (br#"{"prompt":true}"#, ErrorKind::InvalidType),
    (TEXT_AS_MAX_TOKENS, ErrorKind::InvalidType),
    (
        br#"{"prompt":"a","temperature":9}"#,
        ErrorKind::InvalidValue,
    ),
    (br#"{"prompt":"a","colour":1}"#, ErrorKind::UnknownParameter),
    (EXCESSIVE_MAX_TOKENS, ErrorKind::ContextLengthExceeded),
];

const TEXT_AS_MAX_TOKENS: &[u8] = br#"{"prompt":"a","max_tokens":"many"}"#;
const EXCESSIVE_MAX_TOKENS: &[u8] = br#"{"prompt":"a","max_tokens":1000000000}"#;

/// Sends an HTTP request that the server must reject.
pub(super) async fn send_bad_request(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let (body, of_body) = *BAD_BODIES.choose(random).expect("the list is not empty");
    let (mut method, mut path, mut content_type) =
        (Method::POST, "/v1/completions", "application/json");
    let kind = match random.random_range(0..8) {
        0 => {
            path = "/v1/nowhere";
            ErrorKind::NotFound
        }
        1 => {
            method = Method::DELETE;
            ErrorKind::MethodNotAllowed
        }
        2 => {
            content_type = "text/plain";
            ErrorKind::UnsupportedMediaType
        }
        _ => of_body,
    };
    let request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", server.http))
        .header(HOST, &server.http.authority)
        .header(CONTENT_TYPE, content_type)
        .body(Bytes::from_static(body))
        .expect("the request is valid");
    let mut connection = Connection::open(&server.http, random_protocol(random)).await?;
    let (status, body, parsed) = connection.send_for_json(request).await?;
    let row = kind.mapping();
    if status == row.http && parsed["error"]["code"] == row.code {
        return Ok(row.code);
    }
    Err(Fault::unexpected(
        format!("{} {}", row.http, row.code),
        format!("{status}: {body}"),
    ))
}

/// Sends a gRPC message that the server must reject.
pub(super) async fn send_bad_message(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let valid = CompletionRequest::of_tokens(1);
    let with_model = CompletionRequest {
        model: Some("nobody"),
        ..valid
    };
    let too_long = CompletionRequest::of_tokens(TOO_MANY_TOKENS);
    let too_long_kind = ErrorKind::ContextLengthExceeded;
    let encoded = |completion: CompletionRequest<'_>| completion.to_message().encode_to_vec();
    let (method, message, kind) = match random.random_range(0..5) {
        0 => ("Nothing", encoded(valid), ErrorKind::NotFound),
        1 => ("Complete", encoded(with_model), ErrorKind::ModelNotFound),
        2 => ("Complete", encoded(too_long), too_long_kind),
        3 => ("Complete", Vec::new(), ErrorKind::MissingParameter),
        // A field of an unknown wire type.
        _ => ("Complete", vec![0x07, 0xff, 0xff], ErrorKind::Internal),
    };
    let mut connection = Connection::open(&server.grpc, Protocol::Http2).await?;
    let call = grpc_request(&server.grpc, method, &message);
    let response = connection.send(call).await?;
    let in_headers = failed_status(response.headers());
    let body = response.collect().await?;
    let status = in_headers.or_else(|| body.trailers().and_then(failed_status));
    let row = kind.mapping();
    let is_right = status.as_ref().is_some_and(|status| {
        let undecodable = kind == ErrorKind::Internal && status.code() == Code::InvalidArgument;
        let is_code = Some(status.code()) == row.grpc || undecodable;
        is_code && (Error::from(status).kind == kind || undecodable)
    });
    if is_right {
        return Ok(row.code);
    }
    let expected = format!("{:?} {}", row.grpc, row.code);
    Err(Fault::unexpected(expected, format!("{status:?}")))
}

/// Sends an HTTP request with too many headers, or with a header that is too long.
pub(super) async fn send_large_head(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let url = &server.http;
    let mut request = Request::get(format!("{url}/livez")).header(HOST, &url.authority);
    let (protocol, count, size) = match random.random_range(0..3) {
        0 => (Protocol::Http1, 1, 100_000),
        1 => (Protocol::Http1, 150, 1),
        _ => (Protocol::Http2, 150, 1),
    };
    for number in 0..count {
        request = request.header(format!("x-{number}"), "a".repeat(size));
    }
    let request = request.body(Bytes::new()).expect("the request is valid");
    let response = Connection::open(url, protocol).await?.send(request).await?;
    match response.status() {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Ok("431"),
        status => Err(Fault::unexpected("431", status.to_string())),
    }
}

/// Sends random bytes. The server must close the connection.
pub(super) async fn send_garbage(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let mut bytes = vec![0; random.random_range(1..2_000)];
    random.fill_bytes(&mut bytes);
    let mut stream = connect(server.random_api(random)).await?;
    // The server may close the connection before it has received all bytes.
    let _ = stream.write_all(&bytes).await;
    wait_for_close(stream, server.peer_timeout).await
}

/// Sends the start of a request and then nothing, until the server closes the connection or the client leaves.
pub(super) async fn send_half_request(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    const HEAD: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: te";
    const BODY: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n\
        content-type: application/json\r\ncontent-length: 100\r\n\r\n{\"prompt\":";
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let (url, bytes) = match random.random_range(0..5) {
        0 => (&server.http, HEAD),
        1 => (&server.http, BODY),
        2 => (&server.http, PREFACE),
        3 => (&server.grpc, PREFACE),
        _ => (&server.grpc, &PREFACE[..10]),
    };
    let mut stream = connect(url).await?;
    stream.write_all(bytes).await?;
    if random.random() {
        sleep(random.random_range(Duration::ZERO..server.peer_timeout * 2)).await;
        leave(stream, random);
        return Ok("left");
    }
    wait_for_close(stream, server.peer_timeout).await
}

pub(super) async fn send_nothing(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let stream = connect(server.random_api(random)).await?;
    if random.random() {
        sleep(random.random_range(Duration::ZERO..MAX_STAY)).await;
    }
    leave(stream, random);
    Ok("left")
}

/// Waits until the server closes the connection. The server may send an error before, but no success.
async fn wait_for_close(mut stream: TcpStream, peer_timeout: Duration) -> Result<End, Fault> {
    let mut answer = Vec::new();
    // The server's longest timeout is the timeout of bodies: three peer timeouts.
    let limit = peer_timeout * 4 + TIMEOUT_GRACE;
    if timeout(limit, stream.read_to_end(&mut answer))
        .await
        .is_err()
    {
        return Err(Fault::unexpected("an end of the connection", "nothing"));
    }
    match answer.strip_prefix(b"HTTP/1.1 ") {
        Some(status) if !status.starts_with(b"4") => Err(Fault::unexpected(
            "a refusal",
            String::from_utf8_lossy(status),
        )),
        Some(_) => Ok("refused"),
        None => Ok("closed"),
    }
}

fn leave(stream: TcpStream, random: &mut StdRng) {
    if random.random() {
        reset_on_close(&SockRef::from(&stream));
    }
    drop(stream);
}
