//! One HTTP/1.1 connection to an engine.
//!
//! A connection has no task of its own. It advances only while somebody waits for its response, so the task that sends a
//! token to the client is the one that reads it from the engine's socket, and a client that does not read slows the
//! engine down.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_rustls::MaybeHttpsStream;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::poll_waker::PollWaker;
use super::pool::ConnectionPool;

type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Maximum size of the buffer for a connection's data, in bytes, and of the head of a response. Larger buffers made streams
/// at full speed no faster.
const MAX_BUFFER_BYTES: usize = 16 * 1024;

/// A connection, and the driver that reads and writes its socket.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Reads and writes the socket whenever it is polled.
    driver: http1::Connection<Stream, Full<Bytes>>,
}

/// The body of a response. Read to its end, it returns its connection to the pool.
pub(in crate::cluster::openai) struct ResponseBody {
    body: Incoming,
    /// `None` once the connection has closed or has been returned.
    connection: Option<Connection>,
    waker: Arc<PollWaker>,
    pool: Arc<ConnectionPool>,
}

impl Connection {
    /// Prepares a connected stream for requests. Returns `None` if it has broken.
    pub(super) async fn open(stream: Stream) -> Option<Self> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_BUFFER_BYTES);
        match builder.handshake(stream).await {
            Ok((sender, driver)) => Some(Self { sender, driver }),
            Err(error) => {
                tracing::debug!(%error, "a connection to an engine broke");
                None
            }
        }
    }

    /// Returns true if the connection can take a request.
    pub(super) fn is_open(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_drive(&mut cx).is_pending() && self.sender.is_ready()
    }

    /// Sends a request, and waits for the head of its response. Returns `None` if the connection breaks before that.
    pub(super) async fn send(
        mut self,
        request: Request<Full<Bytes>>,
        pool: &Arc<ConnectionPool>,
    ) -> Option<Response<ResponseBody>> {
        let mut response = pin!(self.sender.send_request(request));
        let mut is_open = true;
        let result = poll_fn(|cx| {
            is_open = is_open && self.poll_drive(cx).is_pending();
            match response.as_mut().poll(cx) {
                Poll::Ready(result) => Poll::Ready(Some(result)),
                Poll::Pending if is_open => Poll::Pending,
                Poll::Pending => Poll::Ready(None),
            }
        });
        match result.await? {
            Ok(response) => Some(response.map(|body| ResponseBody {
                body,
                connection: is_open.then_some(self),
                waker: Arc::default(),
                pool: Arc::clone(pool),
            })),
            Err(error) => {
                tracing::debug!(%error, "the connection to an engine broke before its response");
                None
            }
        }
    }

    /// Reads and writes what is possible now. Completes when the connection closes.
    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.driver).poll(cx).map(|result| {
            if let Err(error) = result {
                tracing::debug!(%error, "a connection to an engine broke");
            }
        })
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let (body, connection) = (&mut this.body, &mut this.connection);
        let frame = this.waker.poll(cx, |cx| {
            let frame = Pin::new(&mut *body).poll_frame(cx);
            let Some(driven) = connection.as_mut().filter(|_| frame.is_pending()) else {
                return frame;
            };
            if driven.poll_drive(cx).is_ready() {
                *connection = None;
            }
            Pin::new(&mut *body).poll_frame(cx)
        });
        if matches!(frame, Poll::Ready(None))
            && let Some(connection) = this.connection.take()
        {
            this.pool.put(connection);
        }
        frame
    }
}
