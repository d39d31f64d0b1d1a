//! A connection's socket: it times out when its peer takes nothing, and tells when what was written
//! has left.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
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
use super::resets::{GO_AWAY, ResetLimit};
use crate::delivery::FlushTracker;

/// How long a peer may go on sending what nobody reads any more.
pub(super) const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection of either kind of listener.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Waits until the peer has ended what it sends, whether or not all of it has been read. hyper
    /// looks for that only while it has nothing unread, so a peer that pipelines bytes behind its
    /// request and goes away would not be missed.
    pub(super) async fn closed(&self) {
        // In tokio this interest is told of the end of what is read, and not of the bytes before it.
        let ready = match self {
            Self::Tcp(stream) => stream.ready(Interest::PRIORITY).await,
            Self::Unix(stream) => stream.ready(Interest::PRIORITY).await,
        };
        if ready.is_ok_and(|ready| !ready.is_read_closed()) {
            std::future::pending().await
        }
    }

    /// Ends what is written, then reads and drops what the peer still sends, for a moment. A socket
    /// that is closed with bytes unread resets its connection, and the peer may lose the answer that
    /// it has not read yet: that its body is too large, for one.
    pub(super) async fn linger(&self) {
        if self.shutdown().is_err() {
            return;
        }
        let read = async {
            // Not in the future itself: every connection's task would be as much larger, several times over.
            let mut sink = Vec::with_capacity(4_096);
            loop {
                sink.clear();
                match poll_fn(|cx| self.poll_read(cx, &mut sink)).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
            }
        };
        // However it ends, nobody is left to tell.
        let _ = timeout(LINGER_TIMEOUT, read).await;
    }

    /// Has the socket reset its connection when it closes. What has left before still arrives; what the
    /// peer had no room for is lost with the connection.
    pub(super) fn close_with_reset(&self) {
        match self {
            Self::Tcp(stream) => {
                // A socket that cannot be told so closes in the usual way.
                let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
            // Such a socket has no reset, and HTTP/1.0 no way but this.
            Self::Unix(_) => {}
        }
    }

    /// Writes a last word, where there is room for it now.
    fn try_write(&self, bytes: &[u8]) {
        // Whoever does not get it still sees the connection end.
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

    /// Reads into what is free of the buffer, which need not be initialized: hyper looks for something to
    /// read at every token, and to clear its buffer each time took longer than to write the token.
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

/// Whether the socket only seemed ready: then it is to be asked again.
fn would_block(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// A socket that watches its writes.
pub(super) struct WatchedStream {
    /// Shared with whoever watches for its end.
    stream: Arc<Stream>,
    write_timeout: Duration,
    /// Set while the peer takes nothing of what is to be written.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Whether the peer has not taken all of what was written last.
    is_behind: bool,
    header_timeout: Duration,
    /// Set while the headers of a later HTTP/1.1 request are not whole.
    headers: Option<Pin<Box<Sleep>>>,
    resets: ResetLimit,
    activity: Arc<Activity>,
    flushes: Arc<FlushTracker>,
}

impl WatchedStream {
    pub(super) fn new(
        stream: Arc<Stream>,
        limits: &Limits,
        activity: &Arc<Activity>,
    ) -> (Self, Arc<FlushTracker>) {
        let flushes = Arc::new(FlushTracker::default());
        let watched = Self {
            stream,
            write_timeout: limits.write_timeout,
            stalled: None,
            is_behind: false,
            header_timeout: limits.header_timeout,
            headers: None,
            resets: ResetLimit::new(),
            activity: Arc::clone(activity),
            flushes: Arc::clone(&flushes),
        };
        (watched, flushes)
    }

    /// Passes on what a write came to, or that it has come to nothing for too long.
    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        if !self.is_behind {
            self.is_behind = true;
            self.activity.fell_behind();
        }
        let limit = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        if stalled.deadline() <= Instant::now() || stalled.as_mut().poll(cx).is_ready() {
            let message = "the peer took nothing of what was written for too long";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        Poll::Pending
    }

    /// Notes what was read, and ends the connection of a peer that cancels too many requests.
    fn inspect_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.resets.allows(bytes) {
            if self.resets.is_http2() {
                self.activity.set_http2();
            }
            self.activity.read(bytes);
            return Ok(());
        }
        tracing::warn!("an HTTP/2 client cancelled too many requests; its connection is closed");
        self.stream.try_write(GO_AWAY);
        Err(io::Error::other("the peer cancelled too many requests"))
    }

    /// Waits for the rest of a request's headers, for so long.
    fn wait_for_headers(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.activity.is_reading_headers() {
            self.headers = None;
            return Poll::Pending;
        }
        let limit = self.header_timeout;
        let headers = self.headers.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(headers.as_mut().poll(cx));
        let message = "the headers of a request took too long";
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
            Poll::Ready(Ok(_)) => Poll::Ready(this.inspect_read(&buffer.filled()[before..])),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => this.wait_for_headers(cx),
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
        this.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// A socket holds nothing back: all that hyper has written has left by now.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_behind {
            this.is_behind = false;
            this.activity.caught_up();
        }
        this.flushes.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown())
    }
}
