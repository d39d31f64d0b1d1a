//! A client connection over HTTP/1.1 or HTTP/2. With small buffers, a reader that stops reading soon blocks the
//! server. The connection can also be ended with a reset.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use socket2::{SockRef, Socket};
use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_util::io::InspectReader;
use tokio_util::task::AbortOnDropHandle;

use crate::access::ClientSocket;
use crate::arguments::ServerUrl;
use crate::fault::Fault;

/// HTTP/2 windows that are large enough for a client that keeps reading, in bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 24;
/// Sizes of the HTTP/2 window, the receive buffer and the TCP segments of a narrow connection, in bytes.
const NARROW_WINDOW: u32 = 1_000;
const NARROW_BUFFER: u32 = 4_096;
const NARROW_SEGMENT: u32 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

pub(crate) type Response = http::Response<Incoming>;

/// A connection. It closes when it is dropped.
pub(crate) struct Connection {
    pub(super) url: ServerUrl,
    pub(super) clock: ReadClock,
    requests: RequestSender,
    /// A second handle of the same socket, for ending the connection abruptly.
    socket: Arc<Socket>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

enum RequestSender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Time of a socket's last read.
///
/// hyper may read ahead of its user. So the time may be that of a later read than the one that returned a token, but
/// never of an earlier read.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadClock(Arc<AtomicU64>);

impl ReadClock {
    /// Returns the time right after the last read that returned bytes, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) fn last_read_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Wraps a socket so that the time of each read is recorded. The client's own parsing and wake-ups are then not
    /// counted as latency of the server.
    fn wrap_socket(&self, socket: ClientSocket) -> impl AsyncRead + AsyncWrite + Unpin + use<> {
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
        Self::handshake(connect(url).await?, url, protocol, STREAM_WINDOW).await
    }

    /// Opens a connection with small buffers, so that the server cannot send far ahead of the reader.
    pub(crate) async fn open_narrow(url: &ServerUrl, protocol: Protocol) -> Result<Self, Fault> {
        Self::handshake(connect_narrow(url).await?, url, protocol, NARROW_WINDOW).await
    }

    async fn handshake(
        stream: TcpStream,
        url: &ServerUrl,
        protocol: Protocol,
        window: u32,
    ) -> Result<Self, Fault> {
        let socket = Arc::new(SockRef::from(&stream).try_clone()?);
        let clock = ReadClock::default();
        let stream = url.access.secure(stream, protocol).await?;
        let stream = TokioIo::new(clock.wrap_socket(stream));
        // Ignore the result of this task: the pending responses also report a broken connection.
        let (requests, driver) = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(stream).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (RequestSender::Http1(sender), driver)
            }
            Protocol::Http2 => {
                let mut settings = http2::Builder::new(TokioExecutor::new());
                settings
                    .initial_stream_window_size(window)
                    .initial_connection_window_size(CONNECTION_WINDOW);
                let (sender, connection) = settings.handshake(stream).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (RequestSender::Http2(sender), driver)
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

    /// Returns another handle of an HTTP/2 connection, or `None` for HTTP/1.1, which streams cannot share.
    pub(crate) fn share(&self) -> Option<Self> {
        let requests = match &self.requests {
            RequestSender::Http1(_) => return None,
            RequestSender::Http2(sender) => RequestSender::Http2(sender.clone()),
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
        self.url.access.authorize(request.headers_mut());
        match &mut self.requests {
            RequestSender::Http1(sender) => {
                // HTTP/1.1 has only the path in the request line; the host is a header.
                if let Some(path) = request.uri().path_and_query() {
                    *request.uri_mut() = path.clone().into();
                }
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
            RequestSender::Http2(sender) => {
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
        }
    }

    /// Sends a request. Returns the status and the body of its response, and the body as JSON if it is that.
    pub(crate) async fn send_for_json(
        &mut self,
        request: Request<Bytes>,
    ) -> Result<(StatusCode, String, Value), Fault> {
        let response = self.send(request).await?;
        let status = response.status();
        let body = response.collect().await?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        Ok((
            status,
            text,
            serde_json::from_slice(&body).unwrap_or_default(),
        ))
    }

    pub(crate) fn end_sending(&self) {
        // This fails if the server has already closed the connection.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    pub(crate) fn set_reset_on_close(&self) {
        reset_on_close(&SockRef::from(&*self.socket));
    }
}

pub(crate) async fn connect(url: &ServerUrl) -> Result<TcpStream, Fault> {
    let socket = TcpStream::connect(&url.authority).await;
    let socket = socket.map_err(|why| Fault::Connect {
        address: url.authority.clone(),
        why,
    })?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Opens a socket with a small receive buffer and small segments.
pub(crate) async fn connect_narrow(url: &ServerUrl) -> io::Result<TcpStream> {
    let address = lookup_host(&url.authority).await?.next();
    let address = address.ok_or_else(|| io::Error::other("the host has no address"))?;
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_recv_buffer_size(NARROW_BUFFER)?;
    // The server's send buffer holds several segments, and segments of the loopback interface are large.
    SockRef::from(&socket).set_tcp_mss(NARROW_SEGMENT)?;
    socket.connect(address).await
}

pub(crate) fn reset_on_close(socket: &SockRef<'_>) {
    // If setting this option fails, the socket closes with a FIN instead.
    let _ = socket.set_linger(Some(Duration::ZERO));
}

/// Returns the next piece of a body, or `None` at its end. Stores the trailers that follow the body.
pub(super) async fn next_piece(
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
