//! A connection's socket: it times out when its peer takes nothing, and tells when what was written
//! has left.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, Sleep, sleep, timeout};

/// How long a peer may go on sending what nobody reads any more.
const LINGER: Duration = Duration::from_secs(1);

/// A connection of either kind of listener.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Ends what is written, then reads and drops what the peer still sends, for a moment. A socket
    /// that is closed with bytes unread resets its connection, and the peer may lose the answer that
    /// it has not read yet: that its body is too large, for one.
    pub(super) async fn linger(mut self) {
        let read = async {
            let mut sink = tokio::io::sink();
            match &mut self {
                Self::Tcp(stream) => {
                    stream.shutdown().await?;
                    tokio::io::copy(stream, &mut sink).await
                }
                Self::Unix(stream) => {
                    stream.shutdown().await?;
                    tokio::io::copy(stream, &mut sink).await
                }
            }
        };
        // However it ends, nobody is left to tell.
        let _ = timeout(LINGER, read).await;
    }
}

/// A socket that watches its writes.
pub(super) struct WatchedStream {
    /// Taken out only when this is dropped.
    stream: Option<Stream>,
    /// Where the socket goes when the connection is done with it.
    done: Option<oneshot::Sender<Stream>>,
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
    /// The socket comes back on the receiver when it is no longer used.
    pub(super) fn new(
        stream: Stream,
        write_timeout: Duration,
    ) -> (Self, Arc<Flushes>, oneshot::Receiver<Stream>) {
        let flushes = Arc::new(Flushes::default());
        let (done, returned) = oneshot::channel();
        (
            Self {
                stream: Some(stream),
                done: Some(done),
                write_timeout,
                stalled: None,
                flushes: Arc::clone(&flushes),
            },
            flushes,
            returned,
        )
    }

    fn stream(&mut self) -> &mut Stream {
        self.stream.as_mut().expect("it is taken out only by drop")
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

impl Drop for WatchedStream {
    fn drop(&mut self) {
        if let (Some(stream), Some(done)) = (self.stream.take(), self.done.take()) {
            // Where nobody waits for the socket, it closes here.
            let _ = done.send(stream);
        }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut().stream() {
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
        let written = match this.stream() {
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
        let written = match this.stream() {
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
        ready!(match this.stream() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        })?;
        this.flushes.count.fetch_add(1, Ordering::SeqCst);
        this.flushes.changed.notify_waiters();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().stream() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
