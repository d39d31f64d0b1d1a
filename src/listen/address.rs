//! Where a door listens: TCP addresses or a Unix socket.

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

use super::io::Stream;

mod tcp;

/// How many connections the kernel holds for us while they are being accepted. Half of a storm of
/// 2,000 connections was refused at the usual 128.
const BACKLOG: i32 = 4_096;

/// Where a door listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `host:port`; port 0 takes any free one.
    Tcp(String),
    /// `unix:/path`.
    Unix(PathBuf),
}

/// Why a text is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no address; it must be host:port or unix:/path")]
pub struct InvalidAddress(String);

impl Address {
    /// Whether only this machine can reach it.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
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

/// The bound sockets of an address: one for each address that its host has.
pub struct Listener {
    /// At least one.
    sockets: Vec<BoundSocket>,
    addresses: Vec<Address>,
    /// The socket that is asked first for the next connection.
    turn: AtomicUsize,
}

enum BoundSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds an address, and where its host name has several, all of them. A Unix socket that nobody
    /// answers on any more is replaced.
    ///
    /// # Errors
    /// When the address cannot be resolved, or one that it stands for is taken.
    pub async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => Self::tcp(&lookup_host(address).await?.collect::<Vec<_>>()),
            Address::Unix(path) => Ok(Self {
                sockets: vec![BoundSocket::Unix(bind_unix(path).await?)],
                addresses: vec![address.clone()],
                turn: AtomicUsize::new(0),
            }),
        }
    }

    fn tcp(resolved: &[SocketAddr]) -> io::Result<Self> {
        let sockets = tcp::bind(resolved)?;
        let address = |socket: &TcpListener| Ok(Address::Tcp(socket.local_addr()?.to_string()));
        let addresses = sockets.iter().map(address).collect::<io::Result<_>>()?;
        Ok(Self {
            sockets: sockets.into_iter().map(BoundSocket::Tcp).collect(),
            addresses,
            turn: AtomicUsize::new(0),
        })
    }

    /// The addresses at which it really listens: at least one.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        let stream = poll_fn(|cx| self.poll_accept(cx)).await?;
        if let Stream::Tcp(stream) = &stream {
            // A token is a small packet that must not wait for the next.
            stream.set_nodelay(true)?;
        }
        Ok(stream)
    }

    /// Accepts from whichever socket has a connection. They take turns to be asked first.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.sockets.len();
        let (later, first) = self.sockets.split_at(turn);
        let mut accepted = first
            .iter()
            .chain(later)
            .map(|socket| socket.poll_accept(cx));
        accepted.find(Poll::is_ready).unwrap_or(Poll::Pending)
    }
}

impl BoundSocket {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        match self {
            Self::Tcp(socket) => {
                let accepted = ready!(socket.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| Stream::Tcp(stream)))
            }
            Self::Unix(socket) => {
                let accepted = ready!(socket.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| Stream::Unix(stream)))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        for address in &self.addresses {
            if let Address::Unix(path) = address {
                // Whoever removed it before us meant the same.
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
    socket.listen(BACKLOG)?;
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
        let path = folder.path().join("door.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let address = Address::Unix(path.clone());
        let listener = Listener::bind(&address).await.unwrap();
        let error = Listener::bind(&address).await.err().expect("it is in use");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_unix_socket_is_accessible_only_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door.sock");
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
        let Ok(Stream::Tcp(accepted)) = accepted else {
            panic!("a TCP connection")
        };
        assert!(accepted.nodelay().unwrap());
        drop(connected);
    }

    #[tokio::test]
    async fn every_address_of_a_host_is_bound_to_the_same_port() {
        let any = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 0);
        let listener = Listener::tcp(&[any("127.0.0.1"), any("127.0.0.2")]).unwrap();
        let addresses: Vec<SocketAddr> = listener
            .addresses()
            .iter()
            .map(|address| address.to_string().parse().unwrap())
            .collect();
        assert_eq!(addresses[0].port(), addresses[1].port());
        for address in addresses.iter().chain(&addresses) {
            let connecting = tokio::net::TcpStream::connect(address);
            let (accepted, connected) = tokio::join!(listener.accept(), connecting);
            let Ok(Stream::Tcp(accepted)) = accepted else {
                panic!("a TCP connection")
            };
            assert_eq!(accepted.local_addr().unwrap(), *address);
            drop(connected);
        }
    }
}
