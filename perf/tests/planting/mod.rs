//! An HTTP server of blocking threads that answers as a script says, fault by fault and nanosecond by
//! nanosecond. It shares nothing with the client that it is to test.

#![allow(dead_code, reason = "each crate that includes it uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokenway::runner::monotonic_ns;

/// The head of an answer in chunks.
const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// A server that answers until the test ends.
pub(crate) struct PlantedServer(SocketAddr);

impl PlantedServer {
    /// Answers each request by this script, which is given the request too.
    pub(crate) fn start(script: impl Fn(&str, &mut Answer) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let script = Arc::new(script);
        thread::spawn(move || {
            for socket in listener.incoming() {
                let (socket, script) = (socket.expect("a client"), Arc::clone(&script));
                thread::spawn(move || answer(socket, &*script));
            }
        });
        Self(address)
    }

    /// Answers every request with these bytes, and closes.
    pub(crate) fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let bytes = answer.into();
        Self::start(move |_, answer| {
            answer.raw(&bytes);
            answer.close();
        })
    }

    /// Answers every request with the tokens of these indices as NDJSON, without stamps.
    pub(crate) fn streaming(indices: &'static [u32]) -> Self {
        Self::start(move |_, answer| {
            answer.begin();
            for (place, index) in indices.iter().enumerate() {
                let is_last = place + 1 == indices.len();
                answer.piece(&format!("{}\n", record(*index, is_last, None)));
            }
            answer.end();
        })
    }

    pub(crate) fn authority(&self) -> String {
        self.0.to_string()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.0)
    }
}

/// When a token was due and emitted, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy)]
pub(crate) struct Stamp {
    pub(crate) due_ns: u64,
    pub(crate) emitted_ns: u64,
}

/// A record of a completion with the test runner's token of this index.
pub(crate) fn record(index: u32, is_last: bool, stamp: Option<Stamp>) -> String {
    let reason = if is_last { "\"length\"" } else { "null" };
    let stamp = stamp.map_or_else(String::new, |Stamp { due_ns, emitted_ns }| {
        format!(",\"stamp\":{{\"due_ns\":{due_ns},\"emitted_ns\":{emitted_ns}}}")
    });
    format!(
        "{{\"choices\":[{{\"index\":0,\"text\":\"token_{index}\",\"finish_reason\":{reason}}}]{stamp}}}"
    )
}

/// Waits until then: a planted delay is never shorter than it is said to be.
pub(crate) fn wait_until(then_ns: u64) {
    loop {
        let left = then_ns.saturating_sub(monotonic_ns());
        if left == 0 {
            return;
        }
        thread::park_timeout(Duration::from_nanos(left));
    }
}

/// An answer that is being written.
pub(crate) struct Answer {
    socket: TcpStream,
    /// Which of its connection's it is, from 1.
    pub(crate) number: u32,
}

impl Answer {
    /// Writes the head of an answer in chunks.
    pub(crate) fn begin(&mut self) {
        self.raw(CHUNKED.as_bytes());
    }

    /// Writes a chunk at once.
    pub(crate) fn piece(&mut self, text: &str) {
        self.raw(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
    }

    /// Writes the last chunk.
    pub(crate) fn end(&mut self) {
        self.raw(b"0\r\n\r\n");
    }

    /// Writes bytes as they are. A client may have gone by then.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Says nothing until the client goes.
    pub(crate) fn stall_for_ever(&mut self) {
        let _ = self.socket.read(&mut [0]);
    }

    pub(crate) fn close(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Answers the requests of a connection until the client closes it.
fn answer(socket: TcpStream, script: &(impl Fn(&str, &mut Answer) + ?Sized)) {
    socket.set_nodelay(true).expect("it is a socket");
    let reader = socket.try_clone().expect("it is a socket");
    let (mut reader, mut answer) = (BufReader::new(reader), Answer { socket, number: 0 });
    while let Some(request) = request(&mut reader) {
        answer.number += 1;
        script(&request, &mut answer);
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
