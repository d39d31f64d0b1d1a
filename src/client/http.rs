//! A completion over the HTTP door, as NDJSON.

use std::io::Write;
use std::pin::pin;

use bytes::Bytes;
use futures_util::FutureExt;
use http::Request;
use http::header::{ACCEPT, CONTENT_TYPE, HOST};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{CONNECT_TIMEOUT, ClientError, ClientOptions, show};

const DEFAULT_ADDRESS: &str = "http://127.0.0.1:8000";

pub(super) async fn complete(
    options: &ClientOptions,
    out: &mut dyn Write,
) -> Result<(), ClientError> {
    let address = options.address(DEFAULT_ADDRESS);
    if let Some(path) = address.strip_prefix("unix:") {
        let stream = connected(&address, UnixStream::connect(path)).await?;
        return over(stream, "localhost", options, out).await;
    }
    let invalid = || ClientError::Address(address.clone());
    let host = address
        .strip_prefix("http://")
        .ok_or_else(invalid)?
        .trim_end_matches('/');
    let with_port = if host.contains(':') {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let stream = connected(&address, TcpStream::connect(with_port)).await?;
    over(stream, host, options, out).await
}

async fn connected<S>(
    address: &str,
    connecting: impl Future<Output = std::io::Result<S>>,
) -> Result<S, ClientError> {
    let failed = |problem: String| ClientError::Connect {
        address: address.to_owned(),
        problem,
    };
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed("it takes too long".to_owned())),
    }
}

/// Sends the request on a connection of its own and shows the answer as it comes.
async fn over<S>(
    stream: S,
    host: &str,
    options: &ClientOptions,
    out: &mut dyn Write,
) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |error: hyper::Error| ClientError::Truncated(error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let request = Request::post("/v1/completions")
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "application/x-ndjson")
        .body(Full::new(Bytes::from(body(options).to_string())))
        .map_err(|_| ClientError::Address(host.to_owned()))?;
    // The connection moves while the exchange is waited for, and both end here.
    let mut connection = pin!(connection.fuse());
    let mut answer = pin!(sender.send_request(request));
    let answer = tokio::select! {
        biased;
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(error),
        },
        answer = &mut answer => answer,
    };
    let response = answer.map_err(|error| {
        if error.is_incomplete_message() {
            broken(error)
        } else {
            wrong_protocol(options)
        }
    })?;
    let shown = async {
        if response.status().is_success() {
            show_lines(response.into_body(), out).await
        } else {
            Err(refusal(response.into_body()).await)
        }
    };
    let mut shown = pin!(shown);
    tokio::select! {
        result = &mut shown => result,
        // What was received before that is shown, and then how it ended.
        _ = connection => shown.await,
    }
}

/// What is told where the answer is none of HTTP/1.1.
fn wrong_protocol(options: &ClientOptions) -> ClientError {
    ClientError::WrongProtocol {
        address: options.address(DEFAULT_ADDRESS),
        asked: "HTTP",
        advice: "if it is the gRPC door, say --grpc",
    }
}

fn body(options: &ClientOptions) -> Value {
    json!({
        "model": options.model,
        "prompt": options.prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "stop": options.stop,
        "stream": true,
    })
}

async fn show_lines(mut body: Incoming, out: &mut dyn Write) -> Result<(), ClientError> {
    let mut unread = Vec::new();
    let mut is_finished = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::Truncated(error.to_string()))?;
        unread.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = memchr::memchr(b'\n', &unread) {
            let line: Vec<u8> = unread.drain(..=end).collect();
            is_finished |= show_line(&line, out)?;
        }
    }
    if is_finished {
        Ok(())
    } else {
        Err(ClientError::Truncated(
            "the stream ended without a finish reason".to_owned(),
        ))
    }
}

/// Shows a line's text; true where it is the last one.
fn show_line(line: &[u8], out: &mut dyn Write) -> Result<bool, ClientError> {
    let line: Value = serde_json::from_slice(line)
        .map_err(|error| ClientError::Truncated(format!("a line is no JSON: {error}")))?;
    if !line["error"].is_null() {
        return Err(server_error(&line));
    }
    let choice = &line["choices"][0];
    show(out, choice["text"].as_str().unwrap_or_default())?;
    Ok(!choice["finish_reason"].is_null())
}

async fn refusal(body: Incoming) -> ClientError {
    match body.collect().await {
        Ok(body) => server_error(&serde_json::from_slice(&body.to_bytes()).unwrap_or_default()),
        Err(error) => ClientError::Truncated(error.to_string()),
    }
}

fn server_error(object: &Value) -> ClientError {
    let text = |name: &str| {
        object["error"][name]
            .as_str()
            .unwrap_or("no reason")
            .to_owned()
    };
    ClientError::Server {
        code: text("code"),
        message: text("message"),
    }
}
