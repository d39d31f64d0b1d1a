//! A Unix socket that waits for writability only while its send buffer is full.
//!
//! tokio's `UnixStream` registers for reads and writes together, and Linux reports a Unix socket as writable each
//! time its peer has read. A worker process that sends one token at a time would therefore wake up twice for each
//! token.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::io::{retry_on_intr, write, writev};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::{Receiver, Sender};

/// The worker's end of a Unix socket connection to its engine.
pub(super) struct Socket {
    writing: OwnedFd,
    /// The socket, registered as the reading end of a pipe: tokio then watches readability only.
    reading: Receiver,
    /// The socket, registered as the writing end of a pipe: tokio then watches writability only. `None` unless the
    /// send buffer is full.
    blocked: Option<Sender>,
}

impl Socket {
    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path).await?.into_std()?;
        let writing = OwnedFd::from(stream);
        let reading = Receiver::from_owned_fd_unchecked(writing.try_clone()?)?;
        Ok(Self {
            writing,
            reading,
            blocked: None,
        })
    }

    /// Writes as many bytes as fit. If none fit, waits until the socket is writable.
    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl Fn(&OwnedFd) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let write = |socket: &OwnedFd| retry_on_intr(|| write(socket)).map_err(io::Error::from);
        if self.blocked.is_none() {
            match write(&self.writing) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let writing = self.writing.try_clone()?;
                    self.blocked = Some(Sender::from_owned_fd_unchecked(writing)?);
                }
                written => return Poll::Ready(written),
            }
        }
        while let Some(blocked) = &self.blocked {
            ready!(blocked.poll_write_ready(cx))?;
            match blocked.try_io(|| write(&self.writing)) {
                // The socket was reported as writable but is not.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    self.blocked = None;
                    return Poll::Ready(written);
                }
            }
        }
        unreachable!("the loop ends when a write succeeds, and only then clears `blocked`")
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reading).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |socket| write(socket, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, |socket| writev(socket, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&self.writing).shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// Size of a payload that no socket buffer can hold at once.
    const PAYLOAD_BYTES: usize = 8 * 1024 * 1024;

    /// Creates a connected pair: a `Socket` and its peer.
    async fn pair() -> (Socket, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = Socket::connect(&path).await.unwrap();
        (socket, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_write_waits_until_the_peer_has_read() {
        let (mut socket, mut peer) = pair().await;
        let bytes: Vec<_> = (0..=u8::MAX).cycle().take(PAYLOAD_BYTES).collect();
        let write = async {
            socket.write_all(&bytes).await.unwrap();
            socket.shutdown().await.unwrap();
        };
        let read = async {
            let mut read = Vec::new();
            peer.read_to_end(&mut read).await.unwrap();
            read
        };
        let ((), read) = tokio::join!(write, read);
        assert!(read == bytes, "{} of {PAYLOAD_BYTES} bytes", read.len());
    }

    #[tokio::test]
    async fn both_peers_can_write_at_once_and_see_the_end() {
        let (mut socket, mut peer) = pair().await;
        peer.write_all(b"to the worker").await.unwrap();
        socket.write_all(b"to the engine").await.unwrap();
        let mut bytes = [0; 13];
        socket.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"to the worker");
        peer.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"to the engine");
        drop(peer);
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 0);
        let error = socket.write_all(b"more").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
