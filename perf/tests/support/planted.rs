//! An HTTP server that answers each request as a script says, with exact delays and faults. It uses blocking threads
//! and shares no code with the client under test.

#![allow(dead_code, reason = "each crate that includes it uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokenway::runner::monotonic_ns;

/// Head of a response with a chunked body.
const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";

/// A server that runs until the test ends.
pub(crate) struct PlantedServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl PlantedServer {
    /// Starts a server. For each request, it calls `script` with the request and the response to write.
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
                thread::spawn(move || answer_connection(socket, &*script));
            }
        });
        Self { address, requests }
    }

    /// Starts a server that answers every request with these bytes and closes the connection.
    pub(crate) fn answering(response: impl Into<Vec<u8>>) -> Self {
        let bytes = response.into();
        Self::start(move |_, response| {
            response.write_bytes(&bytes);
            response.close();
        })
    }

    /// Starts a server that answers every request with the tokens of these indices as NDJSON, without timestamps.
    pub(crate) fn streaming(indices: &'static [u32]) -> Self {
        let last = indices.len() - 1;
        let records = indices.iter().enumerate();
        let records = records.map(|(place, index)| token_record(*index, place == last, None));
        Self::sending(records.collect(), Response::write_last_chunk)
    }

    /// Starts a server that answers every request with these records and then ends the response with `end`.
    pub(crate) fn sending(records: Vec<String>, end: fn(&mut Response)) -> Self {
        Self::start(move |_, response| {
            response.write_head();
            for record in &records {
                response.write_record(record);
            }
            end(response);
        })
    }

    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the head and body of each request that has arrived.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

/// Timestamps of a token, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy)]
pub(crate) struct Stamp {
    pub(crate) due_ns: u64,
    pub(crate) emitted_ns: u64,
}

/// Returns the NDJSON record of the test runner's token with this index.
pub(crate) fn token_record(index: u32, is_last: bool, stamp: Option<Stamp>) -> String {
    let reason = if is_last { "\"length\"" } else { "null" };
    let stamp = stamp.map_or_else(String::new, |Stamp { due_ns, emitted_ns }| {
        format!(",\"stamp\":{{\"due_ns\":{due_ns},\"emitted_ns\":{emitted_ns}}}")
    });
    format!(
        "{{\"choices\":[{{\"index\":0,\"text\":\"token_{index}\",\"finish_reason\":{reason}}}]{stamp}}}"
    )
}

/// Blocks until `then_ns`, so that a planted delay is never too short.
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
    /// Number of the request on its connection. The first request has number 1.
    pub(crate) number: u32,
}

impl Response {
    pub(crate) fn write_head(&mut self) {
        self.write_bytes(CHUNKED.as_bytes());
    }

    pub(crate) fn write_record(&mut self, record: &str) {
        let length = record.len() + 1;
        self.write_bytes(format!("{length:x}\r\n{record}\n\r\n").as_bytes());
    }

    pub(crate) fn write_last_chunk(&mut self) {
        self.write_bytes(b"0\r\n\r\n");
    }

    /// Writes these bytes. Ignores errors, because the client may have closed the connection.
    pub(crate) fn write_bytes(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    pub(crate) fn wait_for_close(&mut self) {
        let _ = self.socket.read(&mut [0]);
    }

    pub(crate) fn close(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Answers the requests of a connection until the client closes it.
fn answer_connection(socket: TcpStream, script: &(impl Fn(&str, &mut Response) + ?Sized)) {
    socket.set_nodelay(true).expect("it is a socket");
    let reader = socket.try_clone().expect("it is a socket");
    let (mut reader, mut response) = (BufReader::new(reader), Response { socket, number: 0 });
    while let Some(request) = read_request(&mut reader) {
        response.number += 1;
        script(&request, &mut response);
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<String> {
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
