//! The bytes of a connection: those of its socket, or of a TLS session on top of it.

use std::future::poll_fn;
use std::io::{self, IoSlice, Write};
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

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
    pub(super) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        }
    }

    /// Reads the first bytes that the peer sends, without removing them. Returns their number: 0 if the peer has closed
    /// its sending side.
    pub(super) async fn peek(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.peek(bytes).await,
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
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

    fn poll_write(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
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

/// The bytes of a connection, without or with TLS.
pub(super) enum Transport {
    /// The socket's own bytes.
    Plain(Arc<AcceptedSocket>),
    /// The decrypted bytes. The stream is boxed, so that connections without TLS do not reserve space for it.
    Tls(Box<TlsStream<SocketStream>>),
}

impl Transport {
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_read(cx, buffer).map_ok(|_| ()),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => socket.poll_write(cx, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    /// Sends the data that a TLS session still buffers. A socket has no buffer in user space.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => Poll::Ready(socket.shutdown()),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    /// Number of bytes that the socket below a TLS session has accepted. 0 without TLS.
    pub(super) fn sent_bytes(&self) -> u64 {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(stream) => stream.get_ref().0.sent_bytes,
        }
    }

    /// Returns true if a TLS session has data that the socket has not accepted yet.
    pub(super) fn has_buffered_data(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.get_ref().1.wants_write(),
        }
    }

    /// Writes if the socket accepts data now. Errors are ignored because the connection closes next.
    pub(super) fn try_write(&mut self, bytes: &[u8]) {
        let _ = match self {
            Self::Plain(socket) => socket.try_write(bytes),
            Self::Tls(stream) => {
                let (socket, session) = stream.get_mut();
                let written = session.writer().write(bytes);
                written.and_then(|_| session.write_tls(socket))
            }
        };
    }
}

/// The socket below a TLS session.
pub(super) struct SocketStream {
    socket: Arc<AcceptedSocket>,
    /// Number of bytes that the socket has accepted.
    sent_bytes: u64,
}

impl SocketStream {
    pub(super) fn new(socket: Arc<AcceptedSocket>) -> Self {
        Self {
            socket,
            sent_bytes: 0,
        }
    }

    fn count_sent(&mut self, written: io::Result<usize>) -> io::Result<usize> {
        let count = written?;
        self.sent_bytes += u64::try_from(count).unwrap_or(u64::MAX);
        Ok(count)
    }
}

impl AsyncRead for SocketStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.socket.poll_read(cx, buffer).map_ok(|_| ())
    }
}

impl AsyncWrite for SocketStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(this.socket.poll_write(cx, slices));
        Poll::Ready(this.count_sent(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.shutdown())
    }
}

impl Write for SocketStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.socket.try_write(bytes);
        self.count_sent(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
