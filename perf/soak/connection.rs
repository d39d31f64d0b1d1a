//! One client's connection to a door: HTTP/1.1, or HTTP/2 as the HTTP door or gRPC has it. It can be
//! narrow, so that whoever stands still is felt at once, and it ends as rudely as it is told to.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, Socket};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_util::task::AbortOnDropHandle;

use super::Fault;
use crate::arguments::ServerUrl;

/// Windows that never hold up a reader who reads.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 24;

/// A window, a receive buffer and segments that are soon full.
const NARROW_WINDOW: u32 = 1_000;
const NARROW_BUFFER: u32 = 4_096;
const NARROW_SEGMENT: u32 = 1_000;

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http1,
    Http2,
}

/// How much the server may send ahead of the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Wide,
    Narrow,
}

/// A connection. It closes when it and its answers are dropped.
pub(super) struct Connection {
    requests: Requests,
    /// A second handle of the same socket, for rude ends.
    socket: Socket,
    _driver: AbortOnDropHandle<()>,
}

enum Requests {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(h2::client::SendRequest<Bytes>),
}

/// The head of an answer, and its body as it comes.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

/// A body that is read piece by piece. One that is dropped before its end resets its HTTP/2 stream.
pub(super) enum Body {
    Http1(Incoming),
    Http2(RecvStream),
}

impl Connection {
    pub(super) async fn open(
        url: &ServerUrl,
        protocol: Protocol,
        room: Room,
    ) -> Result<Self, Fault> {
        let stream = match room {
            Room::Wide => connect(url).await?,
            Room::Narrow => connect_narrowly(url).await.map_err(Fault::Connect)?,
        };
        let socket = SockRef::from(&stream).try_clone().map_err(Fault::Connect)?;
        let (requests, driver) = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                // How it ends is told by the answers that were under way.
                let driver = tokio::spawn(async { drop(connection.await) });
                (Requests::Http1(sender), driver)
            }
            Protocol::Http2 => {
                let mut settings = h2::client::Builder::new();
                let window = if room == Room::Narrow {
                    NARROW_WINDOW
                } else {
                    STREAM_WINDOW
                };
                settings
                    .initial_window_size(window)
                    .initial_connection_window_size(CONNECTION_WINDOW);
                let (sender, connection) = settings.handshake(stream).await?;
                let driver = tokio::spawn(async { drop(connection.await) });
                (Requests::Http2(sender), driver)
            }
        };
        Ok(Self {
            requests,
            socket,
            _driver: AbortOnDropHandle::new(driver),
        })
    }

    /// Sends a request, and waits for the head of its answer.
    pub(super) async fn send(&mut self, mut request: Request<Bytes>) -> Result<Answer, Fault> {
        match &mut self.requests {
            Requests::Http1(sender) => {
                // A server is told the path alone; the host is in its header.
                if let Some(path) = request.uri().path_and_query() {
                    *request.uri_mut() = path.clone().into();
                }
                sender.ready().await?;
                let answer = sender.send_request(request.map(Full::new)).await?;
                let (head, body) = answer.into_parts();
                Ok(Answer {
                    status: head.status,
                    headers: head.headers,
                    body: Body::Http1(body),
                })
            }
            Requests::Http2(sender) => {
                let (head, body) = request.into_parts();
                let request = Request::from_parts(head, ());
                let mut ready = sender.clone().ready().await?;
                let (answer, mut upload) = ready.send_request(request, body.is_empty())?;
                if !body.is_empty() {
                    upload.send_data(body, true)?;
                }
                let (head, body) = answer.await?.into_parts();
                Ok(Answer {
                    status: head.status,
                    headers: head.headers,
                    body: Body::Http2(body),
                })
            }
        }
    }

    /// Says that nothing more will be sent, as a client does that closes in an orderly way.
    pub(super) fn end_sending(&self) {
        // A connection that the server has closed has nothing left to end.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Has the socket reset its connection when it closes.
    pub(super) fn close_with_reset(&self) {
        reset_on_close(&SockRef::from(&self.socket));
    }
}

/// A socket to a door, by which little is under way at a time.
async fn connect_narrowly(url: &ServerUrl) -> io::Result<TcpStream> {
    let mut addresses = lookup_host(&url.authority).await?;
    let address = addresses
        .next()
        .ok_or_else(|| io::Error::other("the host has no address"))?;
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_recv_buffer_size(NARROW_BUFFER)?;
    // The server's own buffer is as large as a few segments, which over loopback are huge.
    SockRef::from(&socket).set_tcp_mss(NARROW_SEGMENT)?;
    socket.connect(address).await
}

/// Has a socket reset its connection when it closes.
pub(super) fn reset_on_close(socket: &SockRef<'_>) {
    // One that cannot be told so only closes in the usual way.
    let _ = socket.set_linger(Some(Duration::ZERO));
}

/// A socket to a door.
pub(super) async fn connect(url: &ServerUrl) -> Result<TcpStream, Fault> {
    let stream = TcpStream::connect(&url.authority).await;
    let stream = stream.map_err(Fault::Connect)?;
    stream.set_nodelay(true).map_err(Fault::Connect)?;
    Ok(stream)
}

impl Body {
    /// The next piece; `None` at the end.
    pub(super) async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        match self {
            Self::Http1(body) => loop {
                let Some(frame) = body.frame().await else {
                    return Ok(None);
                };
                // A frame that is no data is trailers, which HTTP/1.1 has none of here.
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

    /// The whole body, of an answer that is no stream.
    pub(super) async fn whole(mut self) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// What comes after the body, when all of it has been read.
    pub(super) async fn trailers(&mut self) -> Result<HeaderMap, Fault> {
        match self {
            Self::Http1(_) => Ok(HeaderMap::new()),
            Self::Http2(body) => Ok(body.trailers().await?.unwrap_or_default()),
        }
    }
}
