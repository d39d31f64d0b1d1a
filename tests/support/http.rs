//! A raw HTTP/1.1 client. It shows exactly what was received, and how the body ended.

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::TestServer;

/// Interim response of a server that begins to read the body of a request with `expect: 100-continue`.
const CONTINUE: &[u8; 25] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A request that has not been sent.
#[derive(Clone)]
pub struct Request {
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

/// A response whose body is read incrementally.
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    stream: Box<dyn ByteStream>,
    /// Bytes received but not yet decoded.
    raw: Vec<u8>,
    /// Body bytes decoded but not yet returned.
    decoded: Vec<u8>,
    /// Number of body bytes still to come, from `content-length`. `None` if the body is chunked.
    remaining: Option<usize>,
    end: Option<BodyEnd>,
}

/// A connection, with or without TLS.
trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for S {}

/// The way a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// The body was complete: its last chunk or its whole `content-length` arrived.
    Clean,
    /// The connection closed before the body was complete.
    Unclean,
}

/// A body that was read to its end.
#[derive(Debug)]
pub struct Body {
    pub text: String,
    pub end: BodyEnd,
}

/// Creates a `POST /v1/completions` request with this body.
pub fn completion(body: &Value) -> Request {
    post("/v1/completions", body.to_string())
}

pub fn post(path: &str, body: impl Into<Vec<u8>>) -> Request {
    let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
    Request {
        method: "POST",
        path: path.to_owned(),
        headers,
        body: body.into(),
    }
}

pub fn get(path: &str) -> Request {
    Request {
        method: "GET",
        path: path.to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
    }
}

impl Request {
    pub fn method(mut self, method: &'static str) -> Self {
        self.method = method;
        self
    }

    /// Sets a header. Replaces another header of the same name.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn without_header(mut self, name: &str) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self
    }

    pub fn accept(self, accept: &str) -> Self {
        self.header("accept", accept)
    }

    /// Returns the bytes of the request.
    pub fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.path);
        if !self.headers.iter().any(|(name, _)| name == "host") {
            head.push_str("host: localhost\r\n");
        }
        if self.method == "POST"
            && !self
                .headers
                .iter()
                .any(|(name, _)| name == "content-length")
        {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        [head.as_bytes(), b"\r\n", &self.body].concat()
    }

    /// Sends the request on a new connection. Reads the response head.
    pub async fn send(self, server: &TestServer) -> Response {
        self.send_to(&server.http_address()).await
    }

    /// Sends the request without the last byte of its body. Returns the connection once the server reads the
    /// body.
    pub async fn upload_unfinished(self, server: &TestServer) -> TcpStream {
        let bytes = self.header("expect", "100-continue").bytes();
        let text = str::from_utf8(&bytes).expect("the request is UTF-8");
        let body = text.find("\r\n\r\n").expect("the request has a head") + 4;
        let mut stream = TcpStream::connect(server.http_address())
            .await
            .expect("the server accepts connections");
        stream
            .write_all(&bytes[..body])
            .await
            .expect("the head is sent");
        let mut answer = [0; CONTINUE.len()];
        stream
            .read_exact(&mut answer)
            .await
            .expect("the server responds");
        assert_eq!(&answer, CONTINUE);
        stream
            .write_all(&bytes[body..bytes.len() - 1])
            .await
            .expect("the body is sent");
        stream
    }

    /// Sends the request to this address. Reads the response head.
    pub async fn send_to(self, address: &str) -> Response {
        let stream = TcpStream::connect(address)
            .await
            .expect("the HTTP API accepts connections");
        self.send_on(stream).await
    }

    /// Sends the request on this connection. Reads the response head.
    pub async fn send_on(
        self,
        mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Response {
        stream
            .write_all(&self.bytes())
            .await
            .expect("the request is written");
        // A TLS stream may still buffer the written bytes.
        stream.flush().await.expect("the request is sent");
        Response::read_head(stream).await
    }

    /// Sends the request and reads the whole response.
    pub async fn fetch(self, server: &TestServer) -> (Response, Body) {
        let mut response = self.send(server).await;
        let body = response.read_rest().await;
        (response, body)
    }
}

impl Response {
    /// Reads a response head from a connection.
    pub async fn read_head(
        mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let mut raw = Vec::new();
        let head_end = loop {
            if let Some(at) = find_bytes(&raw, b"\r\n\r\n") {
                break at;
            }
            let read = stream
                .read_buf(&mut raw)
                .await
                .expect("the response can be read");
            assert!(
                read > 0,
                "the connection closed before the response head: {}",
                String::from_utf8_lossy(&raw)
            );
        };
        let head = String::from_utf8(raw[..head_end].to_vec()).expect("a head is ASCII");
        raw.drain(..head_end + 4);
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .expect("a status line");
        let headers: Vec<_> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let length = headers.iter().find(|(name, _)| name == "content-length");
        let remaining = length.map(|(_, length)| length.parse().expect("a length"));
        Self {
            status: status.parse().expect("a status"),
            headers,
            stream: Box::new(stream),
            raw,
            decoded: Vec::new(),
            remaining,
            end: None,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers_of(name).next()
    }

    /// Returns every value of a header that may be repeated.
    pub fn headers_of(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.headers.iter().filter(move |(known, _)| known == name);
        values.map(|(_, value)| value.as_str())
    }

    /// Reads the next line, without its line break. Returns `None` at the end of the body.
    pub async fn read_line(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.decoded.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.decoded.drain(..=at).collect();
                return Some(String::from_utf8(line[..at].to_vec()).expect("a line is UTF-8"));
            }
            if self.end.is_some() {
                return None;
            }
            self.receive_bytes().await;
        }
    }

    /// Reads the next line and parses it as JSON.
    pub async fn read_json_line(&mut self) -> Option<Value> {
        let line = self.read_line().await?;
        Some(serde_json::from_str(&line).expect("a line is JSON"))
    }

    /// Reads the rest of the body.
    pub async fn read_rest(&mut self) -> Body {
        while self.end.is_none() {
            self.receive_bytes().await;
        }
        let text = String::from_utf8(std::mem::take(&mut self.decoded)).expect("a body is UTF-8");
        Body {
            text,
            end: self.end.expect("the body has ended"),
        }
    }

    async fn receive_bytes(&mut self) {
        let before = self.decoded.len();
        self.decode_body();
        // The bytes that arrived together with the head may be the last for a while, so they are decoded before the
        // next read.
        if self.end.is_some() || self.decoded.len() > before {
            return;
        }
        match self.stream.read_buf(&mut self.raw).await {
            Ok(0) | Err(_) => self.end = Some(BodyEnd::Unclean),
            Ok(_) => self.decode_body(),
        }
    }

    fn decode_body(&mut self) {
        if let Some(remaining) = &mut self.remaining {
            let taken = self.raw.len().min(*remaining);
            self.decoded.extend(self.raw.drain(..taken));
            *remaining -= taken;
            if *remaining == 0 {
                self.end = Some(BodyEnd::Clean);
            }
            return;
        }
        while let Some(line_end) = find_bytes(&self.raw, b"\r\n") {
            let size = std::str::from_utf8(&self.raw[..line_end]).expect("a chunk's size");
            let size = usize::from_str_radix(size, 16).expect("a chunk's size");
            let chunk = line_end + 2..line_end + 2 + size;
            if self.raw.len() < chunk.end + 2 {
                return;
            }
            self.decoded.extend_from_slice(&self.raw[chunk.clone()]);
            self.raw.drain(..chunk.end + 2);
            if size == 0 {
                self.end = Some(BodyEnd::Clean);
                return;
            }
        }
    }
}

impl Body {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).expect("the body is JSON")
    }

    /// Parses the lines of an NDJSON body.
    pub fn lines(&self) -> Vec<Value> {
        self.text
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line is JSON"))
            .collect()
    }

    /// Returns the `data` of each server-sent event.
    pub fn events(&self) -> Vec<&str> {
        self.text
            .split_terminator("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .collect()
    }

    /// Returns `code` and `param` of the error object.
    pub fn error(&self) -> (String, Option<String>) {
        let error = &self.json()["error"];
        let text = |name: &str| error[name].as_str().map(str::to_owned);
        (text("code").expect("an error has a code"), text("param"))
    }
}

/// Returns the text of each line of a choice.
pub fn texts(lines: &[Value], choice: u64) -> Vec<String> {
    let of_choice = lines
        .iter()
        .filter_map(|line| line["choices"].get(0))
        .filter(|c| c["index"] == choice);
    of_choice
        .map(|c| c["text"].as_str().expect("a text").to_owned())
        .collect()
}

fn find_bytes(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
}

/// An HTTP error: (status, `code`, `param`).
pub type HttpError = (u16, String, Option<String>);

/// Sends a request that must be rejected. Returns the error.
pub async fn http_error(server: &TestServer, request: Request) -> HttpError {
    let (response, body) = request.fetch(server).await;
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert!(response.header("x-request-id").is_some());
    let (code, param) = body.error();
    (response.status, code, param)
}

pub fn expected_error(status: u16, code: &str, param: Option<&str>) -> HttpError {
    (status, code.to_owned(), param.map(str::to_owned))
}
