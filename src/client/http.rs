//! Completion over the HTTP API, with an NDJSON stream.

use std::io::Write;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::options::{CONNECT_TIMEOUT, ClientError, ClientOptions};
use super::terminal::write_text;

const DEFAULT_ADDRESS: &str = "http://127.0.0.1:8000";

pub(super) async fn complete(
    options: &ClientOptions,
    out: &mut dyn Write,
) -> Result<(), ClientError> {
    let address = options.address(DEFAULT_ADDRESS);
    if let Some(path) = address.strip_prefix("unix:") {
        let stream = connect(&address, UnixStream::connect(path)).await?;
        return stream_completion(stream, "localhost", options, out).await;
    }
    let invalid = || ClientError::Address(address.clone());
    let url: Uri = address.parse().map_err(|_| invalid())?;
    let (Some(host), Some(authority)) = (url.host(), url.authority()) else {
        return Err(invalid());
    };
    let is_tls = match url.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        Some(_) | None => return Err(invalid()),
    };
    let port = url.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let stream = connect(&address, TcpStream::connect(format!("{host}:{port}"))).await?;
    let authority = authority.as_str();
    if !is_tls {
        return stream_completion(stream, authority, options, out).await;
    }
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(name.to_owned()).map_err(|_| invalid())?;
    let connector = TlsConnector::from(Arc::new(options.tls()?.config()));
    let stream = connect(&address, connector.connect(name, stream)).await?;
    stream_completion(stream, authority, options, out).await
}

/// Waits until the connection is established, for at most [`CONNECT_TIMEOUT`].
async fn connect<S>(
    address: &str,
    connecting: impl Future<Output = std::io::Result<S>>,
) -> Result<S, ClientError> {
    let failed = |problem: String| ClientError::Connect {
        address: address.to_owned(),
        problem,
    };
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected.map_err(|error| failed(error.to_string())),
        Err(_) => Err(failed(format!(
            "timed out after {} s",
            CONNECT_TIMEOUT.as_secs()
        ))),
    }
}

/// Sends the completion request over a connection, and writes the response to `out` as it arrives.
async fn stream_completion<S>(
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
    let mut request = Request::post("/v1/completions");
    if let Some(key) = &options.api_key {
        request = request.header(AUTHORIZATION, key.authorization());
    }
    let request = request
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "application/x-ndjson")
        .body(Full::new(Bytes::from(request_body(options).to_string())))
        .map_err(|_| ClientError::Address(host.to_owned()))?;
    // hyper's connection makes progress only while it is polled, so the connection is polled together with the
    // response.
    let mut connection = pin!(connection.fuse());
    let mut response = pin!(sender.send_request(request));
    let response = tokio::select! {
        biased;
        ended = &mut connection => match ended {
            Ok(()) => response.await,
            Err(error) => Err(error),
        },
        response = &mut response => response,
    };
    let response = response.map_err(|error| {
        if error.is_incomplete_message() {
            broken(error)
        } else {
            wrong_protocol(options)
        }
    })?;
    let shown = async {
        if response.status().is_success() {
            write_lines(response.into_body(), out).await
        } else {
            Err(read_error(response.into_body()).await)
        }
    };
    let mut shown = pin!(shown);
    tokio::select! {
        result = &mut shown => result,
        // The connection has ended, but received data may still be unread. Finish writing the data, then return the
        // result.
        _ = connection => shown.await,
    }
}

/// Returns the error for a response that is not HTTP/1.1.
fn wrong_protocol(options: &ClientOptions) -> ClientError {
    ClientError::WrongProtocol {
        address: options.address(DEFAULT_ADDRESS),
        expected: "HTTP",
        advice: "add --grpc to use the gRPC API",
    }
}

fn request_body(options: &ClientOptions) -> Value {
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

async fn write_lines(mut body: Incoming, out: &mut dyn Write) -> Result<(), ClientError> {
    let mut unread = Vec::new();
    let mut is_finished = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::Truncated(error.to_string()))?;
        unread.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = memchr::memchr(b'\n', &unread) {
            let line: Vec<u8> = unread.drain(..=end).collect();
            is_finished |= write_line(&line, out)?;
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

/// Writes the text of one NDJSON line. Returns true if the line has a finish reason, which makes it the last line.
fn write_line(line: &[u8], out: &mut dyn Write) -> Result<bool, ClientError> {
    let line: Value = serde_json::from_slice(line)
        .map_err(|error| ClientError::Truncated(format!("a line is not valid JSON: {error}")))?;
    if !line["error"].is_null() {
        return Err(server_error(&line));
    }
    let choice = &line["choices"][0];
    write_text(out, choice["text"].as_str().unwrap_or_default())?;
    Ok(!choice["finish_reason"].is_null())
}

/// Reads the error object from the body of an unsuccessful response.
async fn read_error(body: Incoming) -> ClientError {
    match body.collect().await {
        Ok(body) => server_error(&serde_json::from_slice(&body.to_bytes()).unwrap_or_default()),
        Err(error) => ClientError::Truncated(error.to_string()),
    }
}

fn server_error(object: &Value) -> ClientError {
    let text = |name: &str| {
        object["error"][name]
            .as_str()
            .unwrap_or("unknown")
            .to_owned()
    };
    ClientError::Server {
        code: text("code"),
        message: text("message"),
    }
}
