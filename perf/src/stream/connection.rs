//! One client connection over HTTP/1.1 or HTTP/2. Its buffers can be narrow, so that a reader that stops
//! reading soon stops the server, and it can end with a reset.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use http::header::{CONNECTION, HOST};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, Socket};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_util::task::AbortOnDropHandle;

use super::timed::{ReadClock, TimedStream};
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

/// Amount that the server may send ahead of the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Buffers {
    Wide,
    Narrow,
}

/// A connection. It closes once it and its responses are dropped.
pub(crate) struct Connection {
    pub(super) url: ServerUrl,
    pub(super) clock: ReadClock,
    requests: Requests,
    /// A second handle of the same socket, to end it abruptly.
    socket: Socket,
    _driver: AbortOnDropHandle<()>,
}

enum Requests {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(h2::client::SendRequest<Bytes>),
}

/// Head of a response, and its body as it arrives.
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
}

/// A body that is read piece by piece. Dropping it before its end resets its HTTP/2 stream.
pub(crate) enum Body {
    Http1(Incoming),
    Http2(RecvStream),
}

impl Connection {
    pub(crate) async fn open(url: &ServerUrl, protocol: Protocol) -> Result<Self, Fault> {
        let socket = connect(url).await?;
        Self::over(socket, url, protocol, Buffers::Wide).await
    }

    /// Opens a connection on which the server can send little ahead of the reader.
    pub(crate) async fn open_narrow(url: &ServerUrl, protocol: Protocol) -> Result<Self, Fault> {
        let socket = connect_narrow(url).await?;
        Self::over(socket, url, protocol, Buffers::Narrow).await
    }

    async fn over(
        stream: TcpStream,
        url: &ServerUrl,
        protocol: Protocol,
        buffers: Buffers,
    ) -> Result<Self, Fault> {
        let socket = SockRef::from(&stream).try_clone()?;
        let clock = ReadClock::default();
        let stream = TimedStream::new(stream, clock.clone());
        // The driver's own result is dropped: the responses under way report a broken connection.
        let (requests, driver) = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (Requests::Http1(sender), driver)
            }
            Protocol::Http2 => {
                let window = match buffers {
                    Buffers::Wide => STREAM_WINDOW,
                    Buffers::Narrow => NARROW_WINDOW,
                };
                let mut settings = h2::client::Builder::new();
                settings
                    .initial_window_size(window)
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
            _driver: AbortOnDropHandle::new(driver),
        })
    }

    /// Sends a request, and waits for the head of its response.
    pub(crate) async fn send(&mut self, mut request: Request<Bytes>) -> Result<Response, Fault> {
        match &mut self.requests {
            Requests::Http1(sender) => {
                // HTTP/1.1 has only the path in the request line; the host is a header.
                if let Some(path) = request.uri().path_and_query() {
                    *request.uri_mut() = path.clone().into();
                }
                sender.ready().await?;
                let (head, body) = sender
                    .send_request(request.map(Full::new))
                    .await?
                    .into_parts();
                Ok(Response {
                    status: head.status,
                    headers: head.headers,
                    body: Body::Http1(body),
                })
            }
            Requests::Http2(sender) => {
                let (head, body) = request.into_parts();
                let request = Request::from_parts(head, ());
                let mut ready = sender.clone().ready().await?;
                let (response, mut upload) = ready.send_request(request, body.is_empty())?;
                if !body.is_empty() {
                    upload.send_data(body, true)?;
                }
                let (head, body) = response.await?.into_parts();
                Ok(Response {
                    status: head.status,
                    headers: head.headers,
                    body: Body::Http2(body),
                })
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
        reset_on_close(&SockRef::from(&self.socket));
    }
}

/// Fetches a page over a connection of its own, such as `/metrics`.
pub(crate) async fn get(url: &ServerUrl, path: &str) -> Result<String, Fault> {
    let request = Request::get(format!("{url}{path}"))
        .header(HOST, &url.authority)
        .header(CONNECTION, "close")
        .body(Bytes::new())
        .expect("the request is valid");
    let response = Connection::open(url, Protocol::Http1)
        .await?
        .send(request)
        .await?;
    if !response.status.is_success() {
        return Err(Fault::unexpected(path, response.status.to_string()));
    }
    Ok(String::from_utf8_lossy(&response.body.whole().await?).into_owned())
}

/// Opens a socket to a server.
pub(crate) async fn connect(url: &ServerUrl) -> Result<TcpStream, Fault> {
    let socket = TcpStream::connect(&url.authority).await;
    let socket = socket.map_err(|source| Fault::Connect {
        address: url.authority.clone(),
        source,
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

impl Body {
    /// The next piece; `None` at the end.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        match self {
            Self::Http1(body) => loop {
                let Some(frame) = body.frame().await else {
                    return Ok(None);
                };
                // Frames without data are trailers, which no server here sends over HTTP/1.1.
                if let Ok(data) = frame?.into_data() {
                    return Ok(Some(data));
                }
            },
            Self::Http2(body) => {
                let Some(piece) = body.data().await else {
                    return Ok(None);
                };
                let piece = piece?;
                body.flow_control().release_capacity(piece.len())?;
                Ok(Some(piece))
            }
        }
    }

    /// The whole body of a response that is not a stream.
    pub(crate) async fn whole(mut self) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Trailers, once the body has been read to its end.
    pub(crate) async fn trailers(&mut self) -> Result<HeaderMap, Fault> {
        match self {
            Self::Http1(_) => Ok(HeaderMap::new()),
            Self::Http2(body) => Ok(body.trailers().await?.unwrap_or_default()),
        }
    }
}
