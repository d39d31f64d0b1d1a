//! Listen addresses: parsing, binding and accepting on TCP and Unix sockets.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UnixListener, UnixStream, lookup_host};

use super::transport::AcceptedSocket;

mod tcp;

/// Address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `host:port`. Port 0 chooses any free port.
    Tcp(String),
    /// `unix:/path`.
    Unix(PathBuf),
}

/// Error for a text that is not a listen address. Contains the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a valid address; it must be host:port or unix:/path")]
pub struct InvalidAddress(String);

impl Address {
    /// Returns true if only this machine can connect: a loopback address, `localhost` or a Unix socket.
    #[must_use]
    pub(crate) fn is_loopback(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(address) => {
                let host = address.rsplit_once(':').map_or("", |(host, _)| host);
                let host = host.trim_start_matches('[').trim_end_matches(']');
                host == "localhost"
                    || host
                        .parse()
                        .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
            }
        }
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = || InvalidAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path);
            return path
                .is_absolute()
                .then(|| Self::Unix(path.into()))
                .ok_or_else(invalid);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(invalid());
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Sockets bound to an [`Address`]: one for each IP address of its host.
pub struct Listener {
    /// At least one socket.
    sockets: Vec<BoundSocket>,
    addresses: Vec<Address>,
    /// Incremented by each poll. Selects the socket that is polled first.
    next_socket: AtomicUsize,
}

enum BoundSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds every IP address of the host, or the Unix socket. Replaces the file of a Unix socket on which no process
    /// listens any more.
    ///
    /// # Errors
    /// The host cannot be resolved, or one of its addresses cannot be bound.
    pub(crate) async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                Self::bind_tcp(&lookup_host(address).await?.collect::<Vec<_>>())
            }
            Address::Unix(path) => Ok(Self {
                sockets: vec![BoundSocket::Unix(bind_unix(path).await?)],
                addresses: vec![address.clone()],
                next_socket: AtomicUsize::new(0),
            }),
        }
    }

    fn bind_tcp(resolved: &[SocketAddr]) -> io::Result<Self> {
        let sockets = tcp::bind(resolved)?;
        let address = |socket: &TcpListener| Ok(Address::Tcp(socket.local_addr()?.to_string()));
        let addresses = sockets.iter().map(address).collect::<io::Result<_>>()?;
        Ok(Self {
            sockets: sockets.into_iter().map(BoundSocket::Tcp).collect(),
            addresses,
            next_socket: AtomicUsize::new(0),
        })
    }

    /// Returns the addresses of the bound sockets, at least one. If port 0 was requested, they contain the chosen
    /// port.
    #[must_use]
    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    pub(super) async fn accept(&self) -> io::Result<AcceptedSocket> {
        let stream = poll_fn(|cx| self.poll_accept(cx)).await?;
        if let AcceptedSocket::Tcp(stream) = &stream {
            // Each token is a small packet, which Nagle's algorithm would delay.
            stream.set_nodelay(true)?;
        }
        Ok(stream)
    }

    /// Accepts a connection from any of the sockets. Each call starts with the next socket, so that no socket is
    /// starved.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<AcceptedSocket>> {
        let start = self.next_socket.fetch_add(1, Ordering::Relaxed) % self.sockets.len();
        let (before, from_start) = self.sockets.split_at(start);
        let mut accepted = from_start
            .iter()
            .chain(before)
            .map(|socket| socket.poll_accept(cx));
        accepted.find(Poll::is_ready).unwrap_or(Poll::Pending)
    }
}

impl BoundSocket {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<AcceptedSocket>> {
        match self {
            Self::Tcp(socket) => {
                let accepted = ready!(socket.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| AcceptedSocket::Tcp(stream)))
            }
            Self::Unix(socket) => {
                let accepted = ready!(socket.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| AcceptedSocket::Unix(stream)))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        for address in &self.addresses {
            if let Address::Unix(path) = address {
                // Removing the file fails only if the file is already gone.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && UnixStream::connect(path).await.is_err() {
        std::fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    socket.listen(tcp::ACCEPT_BACKLOG)?;
    UnixListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_port_or_a_unix_path() {
        let tcp = |text: &str| Address::Tcp(text.to_owned());
        assert_eq!("127.0.0.1:0".parse(), Ok(tcp("127.0.0.1:0")));
        assert_eq!("[::1]:80".parse(), Ok(tcp("[::1]:80")));
        assert_eq!(
            "unix:/run/t.sock".parse(),
            Ok(Address::Unix("/run/t.sock".into()))
        );
        for text in [
            "",
            "8000",
            ":8000",
            "host:port",
            "host:99999",
            "unix:t.sock",
            "http://a:1",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn loopback_addresses_and_unix_sockets_are_loopback() {
        for text in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "localhost:1",
            "unix:/a",
        ] {
            assert!(text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"] {
            assert!(!text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_stale_unix_socket_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("listen.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let address = Address::Unix(path.clone());
        let listener = Listener::bind(&address).await.unwrap();
        let error = Listener::bind(&address)
            .await
            .err()
            .expect("a second listener cannot bind the same socket");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_unix_socket_is_accessible_only_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("listen.sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
    }

    #[tokio::test]
    async fn accepted_tcp_connections_have_nodelay_set() {
        let any = Address::Tcp("127.0.0.1:0".to_owned());
        let listener = Listener::bind(&any).await.unwrap();
        let connecting = tokio::net::TcpStream::connect(listener.addresses()[0].to_string());
        let (accepted, connected) = tokio::join!(listener.accept(), connecting);
        let Ok(AcceptedSocket::Tcp(accepted)) = accepted else {
            panic!("expected a TCP connection")
        };
        assert!(accepted.nodelay().unwrap());
        drop(connected);
    }

    #[tokio::test]
    async fn every_address_of_a_host_is_bound_to_the_same_port() {
        let any = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 0);
        let listener = Listener::bind_tcp(&[any("127.0.0.1"), any("127.0.0.2")]).unwrap();
        let addresses: Vec<SocketAddr> = listener
            .addresses()
            .iter()
            .map(|address| address.to_string().parse().unwrap())
            .collect();
        assert_eq!(addresses[0].port(), addresses[1].port());
        for address in addresses.iter().chain(&addresses) {
            let connecting = tokio::net::TcpStream::connect(address);
            let (accepted, connected) = tokio::join!(listener.accept(), connecting);
            let Ok(AcceptedSocket::Tcp(accepted)) = accepted else {
                panic!("expected a TCP connection")
            };
            assert_eq!(accepted.local_addr().unwrap(), *address);
            drop(connected);
        }
    }
}
