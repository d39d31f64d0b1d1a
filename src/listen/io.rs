//! A connection's socket: it times out when its peer takes nothing, and tells when what was written
//! has left.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// A connection of either kind of listener.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A socket that watches its writes.
pub(super) struct WatchedStream {
    stream: Stream,
    write_timeout: Duration,
    /// Set while the peer takes nothing of what is to be written.
    stalled: Option<Pin<Box<Sleep>>>,
    flushes: Arc<Flushes>,
}

/// Counts how often everything written so far has left for the socket.
#[derive(Default)]
pub(super) struct Flushes {
    count: AtomicU64,
    changed: Notify,
}

/// Lets a response wait until what it has said has left for the socket.
///
/// hyper flushes a connection only after it has written all that it holds. So whatever a body gave it
/// is on its way once a flush has *begun* after that: on HTTP/1.1, where body and socket are driven
/// by one task, that is the next flush. On HTTP/2 a flush may be under way at that moment, on another
/// thread, so it is the one after the next.
#[derive(Clone)]
pub struct Flush {
    flushes: Arc<Flushes>,
    version: http::Version,
}

impl Flush {
    pub(super) fn new(flushes: Arc<Flushes>, version: http::Version) -> Self {
        Self { flushes, version }
    }

    /// Waits until all that was given to the connection before this call has left, at most so long:
    /// a peer that does not read could keep it for ever.
    pub async fn next(&self, at_most: Duration) {
        let flushes = if self.version == http::Version::HTTP_2 {
            2
        } else {
            1
        };
        let enough = self.flushes.count.load(Ordering::SeqCst) + flushes;
        let left = async {
            loop {
                let changed = self.flushes.changed.notified();
                if self.flushes.count.load(Ordering::SeqCst) >= enough {
                    return;
                }
                changed.await;
            }
        };
        // Too late is as good as left: the caller goes on either way.
        let _ = timeout(at_most, left).await;
    }
}

impl WatchedStream {
    pub(super) fn new(stream: Stream, write_timeout: Duration) -> (Self, Arc<Flushes>) {
        let flushes = Arc::new(Flushes::default());
        (
            Self {
                stream,
                write_timeout,
                stalled: None,
                flushes: Arc::clone(&flushes),
            },
            flushes,
        )
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
        let limit = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        if stalled.deadline() <= Instant::now() || stalled.as_mut().poll(cx).is_ready() {
            let message = "the peer took nothing of what was written for too long";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        Poll::Pending
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = match &mut this.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        this.watch(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = match &mut this.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        };
        this.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(match &mut this.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        })?;
        this.flushes.count.fetch_add(1, Ordering::SeqCst);
        this.flushes.changed.notify_waiters();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
