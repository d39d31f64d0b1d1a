//! A socket that records the time of its last read, so that parsing and waking up in the client are not
//! counted as the server's latency.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Time of a socket's last read.
///
/// A protocol implementation may read ahead of its user, never behind: the time is that of the read
/// which returned the token, or of a later one.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadClock(Arc<AtomicU64>);

impl ReadClock {
    /// Time right after the last read that returned bytes, in nanoseconds of CLOCK_MONOTONIC.
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
