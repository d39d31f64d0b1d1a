//! One client connection over HTTP/1.1 or HTTP/2. Its buffers can be narrow, so that a reader that stops
//! reading soon stops the server, and it can end with a reset.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use socket2::{SockRef, Socket};
use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_util::io::InspectReader;
use tokio_util::task::AbortOnDropHandle;

use crate::arguments::ServerUrl;
use crate::fault::Fault;

/// HTTP/2 windows that never hold up a client that keeps reading.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 24;

/// A window, a receive buffer and segments that are soon full.
const NARROW_WINDOW: u32 = 1_000;
const NARROW_BUFFER: u32 = 4_096;
const NARROW_SEGMENT: u32 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

pub(crate) type Response = http::Response<Incoming>;

/// A connection. It closes once it is dropped.
pub(crate) struct Connection {
    pub(super) url: ServerUrl,
    pub(super) clock: ReadClock,
    requests: Requests,
    /// A second handle of the same socket, to end it abruptly.
    socket: Arc<Socket>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

enum Requests {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Time of a socket's last read.
///
/// A protocol implementation may read ahead of its user, never behind: the time is that of the read
/// which returned a token, or of a later one.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadClock(Arc<AtomicU64>);

impl ReadClock {
    /// Time right after the last read that returned bytes, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) fn last_read_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Records the time of each read of a socket, so that parsing and waking up in the client are not
    /// counted as the server's latency.
    fn timing(&self, socket: TcpStream) -> impl AsyncRead + AsyncWrite + Unpin + use<> {
        let clock = self.clone();
        InspectReader::new(socket, move |read: &[u8]| {
            if !read.is_empty() {
                clock.0.store(monotonic_ns(), Ordering::Relaxed);
            }
        })
    }
}

impl Connection {
    pub(crate) async fn open(url: &ServerUrl, protocol: Protocol) -> Result<Self, Fault> {
        Self::over(connect(url).await?, url, protocol, STREAM_WINDOW).await
    }

    /// Opens a connection on which the server can send little ahead of the reader.
    pub(crate) async fn open_narrow(url: &ServerUrl, protocol: Protocol) -> Result<Self, Fault> {
        Self::over(connect_narrow(url).await?, url, protocol, NARROW_WINDOW).await
    }

    async fn over(
        stream: TcpStream,
        url: &ServerUrl,
        protocol: Protocol,
        window: u32,
    ) -> Result<Self, Fault> {
        let socket = Arc::new(SockRef::from(&stream).try_clone()?);
        let clock = ReadClock::default();
        let stream = TokioIo::new(clock.timing(stream));
        // The driver's own result is dropped: the responses under way report a broken connection.
        let (requests, driver) = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(stream).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (Requests::Http1(sender), driver)
            }
            Protocol::Http2 => {
                let mut settings = http2::Builder::new(TokioExecutor::new());
                settings
                    .initial_stream_window_size(window)
                    .initial_connection_window_size(CONNECTION_WINDOW);
                let (sender, connection) = settings.handshake(stream).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (Requests::Http2(sender), driver)
            }
        };
        Ok(Self {
            url: url.clone(),
            clock,
            requests,
            socket,
            _driver: Arc::new(AbortOnDropHandle::new(driver)),
        })
    }

    /// Another handle of a connection that streams can share, which those of HTTP/2 are.
    pub(crate) fn shared(&self) -> Option<Self> {
        let requests = match &self.requests {
            Requests::Http1(_) => return None,
            Requests::Http2(sender) => Requests::Http2(sender.clone()),
        };
        Some(Self {
            url: self.url.clone(),
            clock: self.clock.clone(),
            requests,
            socket: Arc::clone(&self.socket),
            _driver: Arc::clone(&self._driver),
        })
    }

    /// Sends a request, and waits for the head of its response.
    pub(crate) async fn send(&mut self, request: Request<Bytes>) -> Result<Response, Fault> {
        let mut request = request.map(Full::new);
        match &mut self.requests {
            Requests::Http1(sender) => {
                // HTTP/1.1 has only the path in the request line; the host is a header.
                if let Some(path) = request.uri().path_and_query() {
                    *request.uri_mut() = path.clone().into();
                }
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
            Requests::Http2(sender) => {
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
        }
    }

    /// Closes the sending half with a FIN.
    pub(crate) fn end_sending(&self) {
        // A connection that the server has closed has no half left to end.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Makes the socket send a RST when it closes.
    pub(crate) fn close_with_reset(&self) {
        reset_on_close(&SockRef::from(&*self.socket));
    }
}

/// Opens a socket to a server.
pub(crate) async fn connect(url: &ServerUrl) -> Result<TcpStream, Fault> {
    let socket = TcpStream::connect(&url.authority).await;
    let socket = socket.map_err(|why| Fault::Connect {
        address: url.authority.clone(),
        why,
    })?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Opens a socket that holds few bytes in flight.
async fn connect_narrow(url: &ServerUrl) -> io::Result<TcpStream> {
    let address = lookup_host(&url.authority).await?.next();
    let address = address.ok_or_else(|| io::Error::other("the host has no address"))?;
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_recv_buffer_size(NARROW_BUFFER)?;
    // The server's send buffer holds a few segments, and those of the loopback interface are huge.
    SockRef::from(&socket).set_tcp_mss(NARROW_SEGMENT)?;
    socket.connect(address).await
}

/// Makes a socket send a RST when it closes.
pub(crate) fn reset_on_close(socket: &SockRef<'_>) {
    // A socket that refuses this option closes with a FIN instead.
    let _ = socket.set_linger(Some(Duration::ZERO));
}

/// Next piece of a body; `None` at its end. Trailers that follow it are stored.
pub(super) async fn piece(
    body: &mut Incoming,
    trailers: &mut HeaderMap,
) -> Result<Option<Bytes>, Fault> {
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => return Ok(Some(data)),
            Err(frame) => *trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Ok(None)
}
