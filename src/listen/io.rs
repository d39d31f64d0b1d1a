//! The socket of a connection: write timeout, header timeout, and notification of flushes.

use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::Limits;
use super::activity::Activity;
use super::resets::{GO_AWAY_FRAME, ResetLimit};
use crate::delivery::FlushTracker;

/// Maximum time for reading and discarding the peer's remaining data before the socket closes.
pub(super) const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Socket of an accepted connection.
pub(super) enum AcceptedSocket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AcceptedSocket {
    /// Returns the peer's address. A Unix socket has none, and neither has a TCP socket that the peer has closed.
    pub(super) fn peer_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Waits until the peer has closed its sending side, even if it sent data that has not been read yet. hyper notices
    /// the close only after it has read everything, so it would miss a client that pipelines bytes and disconnects.
    pub(super) async fn peer_closed(&self) {
        // In tokio, PRIORITY becomes ready when the peer closes, but not when it sends ordinary data.
        let ready = match self {
            Self::Tcp(stream) => stream.ready(Interest::PRIORITY).await,
            Self::Unix(stream) => stream.ready(Interest::PRIORITY).await,
        };
        if ready.is_ok_and(|ready| !ready.is_read_closed()) {
            std::future::pending().await
        }
    }

    /// Shuts down the sending side, then reads and discards what the peer still sends, for at most [`LINGER_TIMEOUT`].
    /// Closing a socket with unread data resets the connection, and the peer could lose the last response, such as the
    /// error that its body is too large.
    pub(super) async fn linger(&self) {
        if self.shutdown().is_err() {
            return;
        }
        let read = async {
            // The buffer is on the heap: an array would enlarge the task of every connection.
            let mut sink = Vec::with_capacity(4_096);
            loop {
                sink.clear();
                match poll_fn(|cx| self.poll_read(cx, &mut sink)).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            }
        };
        // Errors are ignored because the socket closes next.
        let _ = timeout(LINGER_TIMEOUT, read).await;
    }

    /// Makes the socket close with a reset. Data that was sent still arrives; data in the send buffer is lost.
    pub(super) fn close_with_reset(&self) {
        match self {
            Self::Tcp(stream) => {
                // If setting the option fails, the socket closes gracefully.
                let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
            // A Unix socket cannot be reset, so an HTTP/1.0 client on a Unix socket cannot detect a truncated body.
            Self::Unix(_) => {}
        }
    }

    /// Writes to the socket if it accepts data now.
    fn try_write(&self, bytes: &[u8]) {
        // Errors are ignored because the connection closes next.
        let _ = match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        };
    }

    fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
            Self::Unix(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
        }
    }

    /// Reads into the spare capacity of `buffer` without initializing that memory. hyper polls for input with every
    /// token, and clearing the buffer each time took longer than writing the token.
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut impl BufMut) -> Poll<io::Result<usize>> {
        loop {
            let read = match self {
                Self::Tcp(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_read_buf(buffer)
                }
                Self::Unix(stream) => {
                    ready!(stream.poll_read_ready(cx))?;
                    stream.try_read_buf(buffer)
                }
            };
            if !would_block(&read) {
                return Poll::Ready(read);
            }
        }
    }

    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let written = match self {
                Self::Tcp(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_write_vectored(slices)
                }
                Self::Unix(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_write_vectored(slices)
                }
            };
            if !would_block(&written) {
                return Poll::Ready(written);
            }
        }
    }
}

/// Returns true if the result is `WouldBlock`: the socket was not ready after all, so the caller must poll again.
fn would_block(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Socket with timeouts for writes and headers, and a limit on HTTP/2 cancellations.
pub(super) struct WatchedStream {
    /// Shared with [`Connection`](super::connection::Connection), which waits for the peer to close.
    stream: Arc<AcceptedSocket>,
    write_timeout: Duration,
    /// Write timeout; set while the socket accepts no data.
    write_timer: Option<Pin<Box<Sleep>>>,
    /// True from a write that could not complete until the next flush.
    has_unsent_data: bool,
    header_timeout: Duration,
    /// Header timeout. Set while the headers of a second or later HTTP/1.1 request are incomplete.
    header_timer: Option<Pin<Box<Sleep>>>,
    resets: ResetLimit,
    activity: Arc<Activity>,
    flushes: Arc<FlushTracker>,
}

impl WatchedStream {
    pub(super) fn new(
        stream: Arc<AcceptedSocket>,
        limits: &Limits,
        activity: &Arc<Activity>,
    ) -> (Self, Arc<FlushTracker>) {
        let flushes = Arc::new(FlushTracker::default());
        let watched = Self {
            stream,
            write_timeout: limits.write_timeout,
            write_timer: None,
            has_unsent_data: false,
            header_timeout: limits.header_timeout,
            header_timer: None,
            resets: ResetLimit::new(),
            activity: Arc::clone(activity),
            flushes: Arc::clone(&flushes),
        };
        (watched, flushes)
    }

    /// Returns the result of a write, or an error once writes have made no progress for the write timeout.
    fn check_write_timeout<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        if !self.has_unsent_data {
            self.has_unsent_data = true;
            self.activity.set_output_blocked();
        }
        let timeout = self.write_timeout;
        let timer = self
            .write_timer
            .get_or_insert_with(|| Box::pin(sleep(timeout)));
        if timer.deadline() <= Instant::now() || timer.as_mut().poll(cx).is_ready() {
            let message = "the peer accepted no data within the write timeout";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        Poll::Pending
    }

    /// Records the bytes that were read. Fails if the peer cancels too many requests.
    fn record_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.resets.count_resets(bytes) {
            if self.resets.is_http2() {
                self.activity.set_http2();
            }
            self.activity.record_read(bytes);
            return Ok(());
        }
        tracing::warn!("closing a connection: the HTTP/2 client cancelled too many requests");
        self.stream.try_write(GO_AWAY_FRAME);
        Err(io::Error::other("the peer cancelled too many requests"))
    }

    /// Fails once the headers of a request have been incomplete for the header timeout.
    fn check_header_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.activity.is_reading_headers() {
            self.header_timer = None;
            return Poll::Pending;
        }
        let timeout = self.header_timeout;
        let timer = self
            .header_timer
            .get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(timer.as_mut().poll(cx));
        let message = "the peer did not complete the request headers within the header timeout";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        match this.stream.poll_read(cx, buffer) {
            Poll::Ready(Ok(_)) => Poll::Ready(this.record_read(&buffer.filled()[before..])),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => this.check_header_timeout(cx),
        }
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.stream.poll_write(cx, slices);
        this.check_write_timeout(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Reports that all written data was flushed. A socket has no buffer in user space, so everything that hyper
    /// wrote has already been sent.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.has_unsent_data {
            this.has_unsent_data = false;
            this.activity.clear_output_blocked();
        }
        this.flushes.record_flush();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown())
    }
}
