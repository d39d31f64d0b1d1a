//! An HTTP server of blocking threads that answers by a script, fault by fault and nanosecond by nanosecond.
//! It shares no code with the client under test.

#![allow(dead_code, reason = "each crate that includes it uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokenway::runner::monotonic_ns;

/// Head of a response in chunks.
const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";

/// A server that runs until the test ends.
pub(crate) struct PlantedServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl PlantedServer {
    /// Answers each request by a script, which also gets the request.
    pub(crate) fn start(script: impl Fn(&str, &mut Response) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let script = Arc::new(move |request: &str, response: &mut Response| {
            seen.lock().expect("no panic").push(request.to_owned());
            script(request, response);
        });
        thread::spawn(move || {
            for socket in listener.incoming() {
                let (socket, script) = (socket.expect("a client"), Arc::clone(&script));
                thread::spawn(move || answer(socket, &*script));
            }
        });
        Self { address, requests }
    }

    /// Answers every request with these bytes, and closes the connection.
    pub(crate) fn answering(response: impl Into<Vec<u8>>) -> Self {
        let bytes = response.into();
        Self::start(move |_, response| {
            response.raw(&bytes);
            response.close();
        })
    }

    /// Answers every request with the tokens of these indices as NDJSON, without stamps.
    pub(crate) fn streaming(indices: &'static [u32]) -> Self {
        Self::start(move |_, response| {
            response.start();
            for (place, index) in indices.iter().enumerate() {
                let is_last = place + 1 == indices.len();
                response.record(&record(*index, is_last, None));
            }
            response.end();
        })
    }

    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests that have arrived, each with its head and body.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

/// Times of a token, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy)]
pub(crate) struct Stamp {
    pub(crate) due_ns: u64,
    pub(crate) emitted_ns: u64,
}

/// A record with the test runner's token of this index.
pub(crate) fn record(index: u32, is_last: bool, stamp: Option<Stamp>) -> String {
    let reason = if is_last { "\"length\"" } else { "null" };
    let stamp = stamp.map_or_else(String::new, |Stamp { due_ns, emitted_ns }| {
        format!(",\"stamp\":{{\"due_ns\":{due_ns},\"emitted_ns\":{emitted_ns}}}")
    });
    format!(
        "{{\"choices\":[{{\"index\":0,\"text\":\"token_{index}\",\"finish_reason\":{reason}}}]{stamp}}}"
    )
}

/// Blocks until then: a planted delay is never shorter than it claims to be.
pub(crate) fn wait_until(then_ns: u64) {
    loop {
        let left = then_ns.saturating_sub(monotonic_ns());
        if left == 0 {
            return;
        }
        thread::park_timeout(Duration::from_nanos(left));
    }
}

/// A response that is being written.
pub(crate) struct Response {
    socket: TcpStream,
    /// Number of its request on the connection, from 1.
    pub(crate) number: u32,
}

impl Response {
    /// Writes the head of a response in chunks.
    pub(crate) fn start(&mut self) {
        self.raw(CHUNKED.as_bytes());
    }

    /// Writes a line as a chunk of its own.
    pub(crate) fn record(&mut self, record: &str) {
        let length = record.len() + 1;
        self.raw(format!("{length:x}\r\n{record}\n\r\n").as_bytes());
    }

    /// Writes the last chunk.
    pub(crate) fn end(&mut self) {
        self.raw(b"0\r\n\r\n");
    }

    /// Writes bytes. The client may have closed the connection.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Writes nothing until the client closes the connection.
    pub(crate) fn stall(&mut self) {
        let _ = self.socket.read(&mut [0]);
    }

    pub(crate) fn close(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Answers the requests of a connection until the client closes it.
fn answer(socket: TcpStream, script: &(impl Fn(&str, &mut Response) + ?Sized)) {
    socket.set_nodelay(true).expect("it is a socket");
    let reader = socket.try_clone().expect("it is a socket");
    let (mut reader, mut response) = (BufReader::new(reader), Response { socket, number: 0 });
    while let Some(request) = request(&mut reader) {
        response.number += 1;
        script(&request, &mut response);
    }
}

fn request(reader: &mut impl BufRead) -> Option<String> {
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
        head.push_str(&line);
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(head + &String::from_utf8(body).expect("a request is text"))
}
