//! A socket that notes when it was last read. A client's own parsing and waking up come after that
//! and are no fault of the server's. It knows nothing of what is read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// When a socket was last read.
///
/// A client that takes a token may read on before it asks, never the other way round: the time is
/// that of the read which brought the token, or a later one.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadClock(Arc<AtomicU64>);

impl ReadClock {
    /// The time right after the last read that brought anything, in nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn last_read_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A socket whose reads are timed.
#[derive(Debug)]
pub(crate) struct TimedStream {
    socket: TcpStream,
    clock: ReadClock,
}

impl TimedStream {
    pub(crate) fn new(socket: TcpStream, clock: ReadClock) -> Self {
        Self { socket, clock }
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.socket).poll_read(cx, buf));
        if buf.filled().len() > before {
            self.clock.0.store(monotonic_ns(), Ordering::Relaxed);
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
