//! Clients that send what no server should be sent, or nothing, and what they must be told for it.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, StatusCode};
use prost::Message;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use serde_json::Value;
use socket2::SockRef;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::Fault;
use super::client::Doors;
use super::connection::{Connection, Protocol, Room, connect, reset_on_close};
use super::readers::protocol;
use super::stream::{failed_status, grpc};
use super::tally::End;
use crate::arguments::ServerUrl;

/// How long a client stays at most that has no business here.
const STAY: Duration = Duration::from_millis(100);

/// A server may take so much longer than its limits, on a machine that is busy.
const GRACE: Duration = Duration::from_secs(10);

/// Bodies that are refused, and what for.
const BODIES: [(&[u8], ErrorKind); 8] = [
    (b"{\"prompt\":", ErrorKind::InvalidJson),
    (b"\xff\xfe{}", ErrorKind::InvalidJson),
    (b"{}", ErrorKind::MissingParameter),
    (b"{\"prompt\":true}", ErrorKind::InvalidType),
    (
        b"{\"prompt\":\"a\",\"max_tokens\":\"many\"}",
        ErrorKind::InvalidType,
    ),
    (
        b"{\"prompt\":\"a\",\"temperature\":9}",
        ErrorKind::InvalidValue,
    ),
    (
        b"{\"prompt\":\"a\",\"colour\":\"red\"}",
        ErrorKind::UnknownParameter,
    ),
    (
        b"{\"prompt\":\"a\",\"max_tokens\":1000000000}",
        ErrorKind::ContextLengthExceeded,
    ),
];

/// A request over HTTP that must be refused.
pub(super) async fn request(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let (body, of_body) = *BODIES.choose(random).expect("there are some");
    let (method, path, content_type, kind) = match random.random_range(0..8) {
        0 => (
            Method::POST,
            "/v1/nowhere",
            "application/json",
            ErrorKind::NotFound,
        ),
        1 => (
            Method::DELETE,
            "/v1/completions",
            "application/json",
            ErrorKind::MethodNotAllowed,
        ),
        2 => (
            Method::POST,
            "/v1/completions",
            "text/plain",
            ErrorKind::UnsupportedMediaType,
        ),
        _ => (Method::POST, "/v1/completions", "application/json", of_body),
    };
    let request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", doors.http))
        .header(HOST, &doors.http.authority)
        .header(CONTENT_TYPE, content_type)
        .body(Bytes::from_static(body))
        .expect("it is a whole request");
    let mut connection = Connection::open(&doors.http, protocol(random), Room::Wide).await?;
    let answer = connection.send(request).await?;
    let status = answer.status;
    let body = answer.body.whole().await?;
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let row = kind.row();
    if status == row.http && parsed["error"]["code"] == row.code {
        return Ok(row.code);
    }
    let body = String::from_utf8_lossy(&body);
    let expected = format!("{} {}", row.http, row.code);
    Err(Fault::answer(&expected, format!("{status}: {body}")))
}

/// A call over gRPC that must be refused.
pub(super) async fn message(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let prompt = || Some(Input::Prompt("a".to_owned()));
    let valid = v1::CompletionRequest {
        input: prompt(),
        ..v1::CompletionRequest::default()
    };
    let (method, message, kind) = match random.random_range(0..5) {
        0 => ("Nothing", valid.encode_to_vec(), ErrorKind::NotFound),
        1 => {
            let model = "nobody".to_owned();
            let request = v1::CompletionRequest { model, ..valid };
            (
                "Complete",
                request.encode_to_vec(),
                ErrorKind::ModelNotFound,
            )
        }
        2 => {
            let max_tokens = Some(1_000_000_000);
            let request = v1::CompletionRequest {
                max_tokens,
                ..valid
            };
            (
                "Complete",
                request.encode_to_vec(),
                ErrorKind::ContextLengthExceeded,
            )
        }
        3 => ("Complete", Vec::new(), ErrorKind::MissingParameter),
        // A field of no known wire type.
        _ => ("Complete", vec![0x07, 0xff, 0xff], ErrorKind::Internal),
    };
    let mut connection = Connection::open(&doors.grpc, Protocol::Http2, Room::Wide).await?;
    let mut answer = connection.send(grpc(&doors.grpc, method, &message)).await?;
    while answer.body.piece().await?.is_some() {}
    let status = match failed_status(&answer.headers) {
        Some(status) => Some(status),
        None => failed_status(&answer.body.trailers().await?),
    };
    let row = kind.row();
    let is_right = status.as_ref().is_some_and(|status| {
        let undecodable = kind == ErrorKind::Internal && status.code() == Code::InvalidArgument;
        let is_code = Some(status.code()) == row.grpc || undecodable;
        is_code && (Error::from(status).kind == kind || undecodable)
    });
    if is_right {
        Ok(row.code)
    } else {
        let expected = format!("{:?} {}", row.grpc, row.code);
        Err(Fault::answer(&expected, format!("{status:?}")))
    }
}

/// A request whose headers are too many, or too long.
pub(super) async fn headers(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let url = &doors.http;
    let mut request = Request::get(format!("{url}/livez")).header(HOST, &url.authority);
    let (protocol, count, size) = match random.random_range(0..3) {
        0 => (Protocol::Http1, 1, 100_000),
        1 => (Protocol::Http1, 150, 1),
        _ => (Protocol::Http2, 150, 1),
    };
    for number in 0..count {
        request = request.header(format!("x-{number}"), "a".repeat(size));
    }
    let request = request.body(Bytes::new()).expect("it is a whole request");
    let mut connection = Connection::open(url, protocol, Room::Wide).await?;
    let answer = connection.send(request).await?;
    match answer.status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => Ok("431"),
        status => Err(Fault::answer("431", status.to_string())),
    }
}

/// Bytes that mean nothing: the server must close the connection.
pub(super) async fn garbage(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let mut bytes = vec![0; random.random_range(1..2_000)];
    random.fill_bytes(&mut bytes);
    let mut stream = connect(any(doors, random)).await?;
    // A server may close before it has taken them all.
    let _ = stream.write_all(&bytes).await;
    closed(stream, doors.patience).await
}

/// The beginning of a request, and then silence, until the server closes or the client leaves.
pub(super) async fn half(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    const HEAD: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: te";
    const BODY: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n\
        content-type: application/json\r\ncontent-length: 100\r\n\r\n{\"prompt\":";
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let (url, bytes) = match random.random_range(0..5) {
        0 => (&doors.http, HEAD),
        1 => (&doors.http, BODY),
        2 => (&doors.http, PREFACE),
        3 => (&doors.grpc, PREFACE),
        _ => (&doors.grpc, &PREFACE[..10]),
    };
    let mut stream = connect(url).await?;
    stream.write_all(bytes).await.map_err(Fault::Connect)?;
    if random.random() {
        sleep(random.random_range(Duration::ZERO..doors.patience * 2)).await;
        leave(stream, random);
        return Ok("left");
    }
    closed(stream, doors.patience).await
}

/// A connection that is opened and closed again.
pub(super) async fn nothing(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let stream = connect(any(doors, random)).await?;
    if random.random() {
        sleep(random.random_range(Duration::ZERO..STAY)).await;
    }
    leave(stream, random);
    Ok("left")
}

/// Waits until the server closes. What it says before must be no success.
async fn closed(mut stream: TcpStream, patience: Duration) -> Result<End, Fault> {
    let mut said = Vec::new();
    // Its longest limit is that of bodies, three times its patience.
    let closed = timeout(patience * 4 + GRACE, stream.read_to_end(&mut said)).await;
    if closed.is_err() {
        return Err(Fault::answer("an end of the connection", "nothing"));
    }
    match said.strip_prefix(b"HTTP/1.1 ") {
        Some(status) if !status.starts_with(b"4") => {
            let status = String::from_utf8_lossy(status);
            Err(Fault::answer("a refusal", status))
        }
        Some(_) => Ok("refused"),
        None => Ok("closed"),
    }
}

/// Closes a connection in one of two ways.
fn leave(stream: TcpStream, random: &mut StdRng) {
    if random.random() {
        reset_on_close(&SockRef::from(&stream));
    }
    drop(stream);
}

fn any<'a>(doors: &'a Doors, random: &mut StdRng) -> &'a ServerUrl {
    if random.random() {
        &doors.http
    } else {
        &doors.grpc
    }
}
