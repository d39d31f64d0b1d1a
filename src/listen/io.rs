//! A connection's socket: it times out when its peer takes nothing, and tells when what was written
//! has left.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::runner::monotonic_ns;
use crate::telemetry::StageTimes;

/// How long a peer may go on sending what nobody reads any more.
pub(super) const LINGER: Duration = Duration::from_secs(1);

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
        let _ = timeout(LINGER, read).await;
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
    flushes: Arc<Flushes>,
}

/// Counts how often everything written so far has left for the socket.
#[derive(Default)]
pub(super) struct Flushes {
    count: AtomicU64,
    changed: Notify,
    /// Tokens whose time in the socket's stage ends with the next flush.
    leaving: Mutex<Vec<Leaving>>,
    is_anything_leaving: AtomicBool,
}

/// Tokens that were written, and wait for the flush.
struct Leaving {
    times: Arc<StageTimes>,
    tokens: u64,
    since_ns: u64,
}

/// How many writes are timed one by one until a flush. A connection whose peer does not read may have
/// more: the tokens of those are not timed.
const LEAVING: usize = 256;

impl Flushes {
    /// Everything that was written has left.
    pub(super) fn flushed(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
        if self.is_anything_leaving.swap(false, Ordering::SeqCst) {
            let now_ns = monotonic_ns();
            for left in self.leaving().drain(..) {
                left.times
                    .record(left.tokens, now_ns.saturating_sub(left.since_ns));
            }
        }
    }

    /// Held for a push or for a drain, and by one task at a time but on HTTP/2.
    fn leaving(&self) -> MutexGuard<'_, Vec<Leaving>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a response wait until what it has said has left for the socket.
///
/// hyper flushes a connection only after it has written all that it holds. So whatever a body gave it
/// is on its way once a flush has *begun* after that: on HTTP/1.1, where body and socket are driven
/// by one task, that is the next flush. On HTTP/2 a flush may be under way at that moment, on another
/// thread, so it is the one after the next; and only what the peer's window has room for is flushed.
#[derive(Clone)]
pub struct Flush {
    flushes: Arc<Flushes>,
    version: http::Version,
}

impl Flush {
    pub(super) fn new(flushes: Arc<Flushes>, version: http::Version) -> Self {
        Self { flushes, version }
    }

    /// Counts so many tokens as long in the socket's stage as they take from `since_ns` to the next
    /// flush.
    pub(super) fn time(&self, times: &Arc<StageTimes>, tokens: u64, since_ns: u64) {
        let mut leaving = self.flushes.leaving();
        if leaving.len() < LEAVING {
            leaving.push(Leaving {
                times: Arc::clone(times),
                tokens,
                since_ns,
            });
        }
        drop(leaving);
        self.flushes
            .is_anything_leaving
            .store(true, Ordering::SeqCst);
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
    pub(super) fn new(stream: Arc<Stream>, write_timeout: Duration) -> (Self, Arc<Flushes>) {
        let flushes = Arc::new(Flushes::default());
        let watched = Self {
            stream,
            write_timeout,
            stalled: None,
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
        self.stream.poll_read(cx, buffer).map_ok(|_| ())
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
        self.flushes.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown())
    }
}
