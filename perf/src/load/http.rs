//! A minimal client that reads and checks a stream over HTTP/1.1 or over a raw socket.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};

use super::Load;
use super::consumer::Consumer;
use super::generator::SharedLoad;
use super::response::ResponseParser;
use crate::access::ClientSocket;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{Decoder, Format, Protocol, connect};

/// A connection that is reused for as long as the server keeps it open.
pub(super) struct Connection {
    socket: ClientSocket,
    format: Format,
    is_idle: bool,
}

impl Connection {
    pub(super) async fn open(url: &ServerUrl, format: Format) -> Result<Self, Fault> {
        let socket = connect(url).await?;
        Ok(Self {
            socket: url.access.secure(socket, Protocol::Http1).await?,
            format,
            is_idle: true,
        })
    }

    /// Returns true if another request can be sent: the last response has ended, and the server keeps the connection
    /// open.
    pub(super) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Sends a request and passes the events of its stream to `consumer`.
    pub(super) async fn run_request(
        &mut self,
        shared: &SharedLoad,
        consumer: &mut Consumer,
    ) -> Result<(), Fault> {
        self.is_idle = false;
        let is_raw = self.format == Format::Raw;
        let mut response = if is_raw {
            ResponseParser::without_head()
        } else {
            ResponseParser::new()
        };
        let mut decoder = Decoder::of_http();
        self.socket.write_all(&shared.request).await?;
        while !response.has_ended() {
            let read = self.read(shared).await?;
            let received_ns = monotonic_ns();
            if read == 0 {
                response.handle_close()?;
                if is_raw || !response.has_ended() {
                    return Err(Fault::cut_off(consumer.token_count(), "its end"));
                }
                break;
            }
            let mut stats = shared.stats.borrow_mut();
            stats.record_read(read);
            let piece = &shared.buffer.borrow()[..read];
            response.parse_piece(piece, |data| {
                decoder.read(data, |event| {
                    consumer.consume_event(event, received_ns, &mut stats)
                })
            })?;
            if is_raw && decoder.missing_part().is_none() {
                break;
            }
        }
        self.is_idle = response.keeps_connection();
        match decoder.missing_part() {
            None => Ok(()),
            Some(missing) => Err(Fault::cut_off(consumer.token_count(), missing)),
        }
    }

    async fn read(&mut self, shared: &SharedLoad) -> io::Result<usize> {
        let socket = &mut self.socket;
        poll_fn(|cx| {
            let mut buffer = shared.buffer.borrow_mut();
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer))?;
            Poll::Ready(Ok(buffer.filled().len()))
        })
        .await
    }
}

/// Returns the request as the bytes that are written to a connection.
pub(super) fn encode_request(url: &ServerUrl, format: Format, load: &Load) -> Bytes {
    let completion = load.completion_request();
    let body = completion.to_json();
    if format == Format::Raw {
        return format!("{body}\n").into();
    }
    let accept = format.content_type();
    let (path, host, length) = (
        url.path(completion.input.path()),
        &url.authority,
        body.len(),
    );
    let key = match &url.access.key {
        Some(key) => format!("authorization: Bearer {key}\r\n"),
        None => String::new(),
    };
    format!(
        "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{key}\
         accept: {accept}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into()
}
