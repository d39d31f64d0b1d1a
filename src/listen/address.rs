//! Where a door listens: a TCP address or a Unix socket.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UnixListener, UnixStream, lookup_host};

use super::io::Stream;

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

/// A bound socket.
pub struct Listener {
    socket: BoundSocket,
    address: Address,
}

enum BoundSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds an address. A Unix socket that nobody answers on any more is replaced.
    ///
    /// # Errors
    /// When the address cannot be resolved, or is taken.
    pub async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let socket = bind_tcp(address).await?;
                let address = Address::Tcp(socket.local_addr()?.to_string());
                Ok(Self {
                    socket: BoundSocket::Tcp(socket),
                    address,
                })
            }
            Address::Unix(path) => {
                let socket = BoundSocket::Unix(bind_unix(path).await?);
                Ok(Self {
                    socket,
                    address: address.clone(),
                })
            }
        }
    }

    /// Where it really listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            BoundSocket::Tcp(socket) => {
                let (stream, _) = socket.accept().await?;
                // A token is a small packet that must not wait for the next.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            BoundSocket::Unix(socket) => Ok(Stream::Unix(socket.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Whoever removed it before us meant the same.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn bind_tcp(address: &str) -> io::Result<TcpListener> {
    let resolved = lookup_host(address).await?.next().ok_or_else(|| {
        io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address")
    })?;
    let socket = Socket::new(
        Domain::for_address(resolved),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&resolved.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
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
    fn only_this_machine_reaches_a_loopback_address() {
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
    async fn only_its_owner_reaches_a_unix_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door.sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
    }

    #[tokio::test]
    async fn a_small_packet_does_not_wait_for_the_next() {
        let any = Address::Tcp("127.0.0.1:0".to_owned());
        let listener = Listener::bind(&any).await.unwrap();
        let connecting = tokio::net::TcpStream::connect(listener.address().to_string());
        let (accepted, connected) = tokio::join!(listener.accept(), connecting);
        let Ok(Stream::Tcp(accepted)) = accepted else {
            panic!("a TCP connection")
        };
        assert!(accepted.nodelay().unwrap());
        drop(connected);
    }
}
