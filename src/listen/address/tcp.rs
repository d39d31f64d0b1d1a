//! Binding of every IP address of a host to one TCP port.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Maximum number of connections that the kernel queues before they are accepted. With the usual 128, half of 2,000
/// simultaneous connections were refused.
pub(super) const ACCEPT_BACKLOG: i32 = 4_096;

/// Number of attempts to find a port that is free at every address of a host.
const MAX_PORT_ATTEMPTS: usize = 16;

/// Binds one socket. Tests replace this function to simulate a machine with other addresses.
trait BindSocket: Fn(SocketAddr, Ipv6Only) -> io::Result<Socket> {}

impl<F: Fn(SocketAddr, Ipv6Only) -> io::Result<Socket>> BindSocket for F {}

/// Setting of `IPV6_V6ONLY`, which keeps an IPv6 socket from accepting IPv4 connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ipv6Only {
    /// The operating system's default.
    SystemDefault,
    /// Accept only IPv6, because the host's IPv4 address gets a socket of its own.
    Yes,
}

/// Binds all addresses of a host, which share one port. With port 0, chooses a port that is free at all of them.
///
/// An address that this machine does not have is skipped if another one can be bound: a host name may have an IPv6
/// address although IPv6 is disabled.
pub(super) fn bind(addresses: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let mut addresses = addresses.to_vec();
    addresses.sort_by_key(SocketAddr::is_ipv4);
    addresses.dedup();
    let bound = bind_at_one_port(&addresses, &bind_one)?;
    bound
        .into_iter()
        .map(|socket| {
            socket.listen(ACCEPT_BACKLOG)?;
            TcpListener::from_std(socket.into())
        })
        .collect()
}

/// Binds all addresses. With port 0, tries another port if the chosen port is in use at one of the addresses.
fn bind_at_one_port(addresses: &[SocketAddr], bind: &impl BindSocket) -> io::Result<Vec<Socket>> {
    let is_any_port = addresses.iter().all(|address| address.port() == 0);
    let mut attempts = if is_any_port { MAX_PORT_ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        match bind_all(addresses, bind) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && attempts > 0 => {}
            bound => return bound,
        }
    }
}

/// Binds each address once. With port 0, the kernel chooses the port of the first socket, and the other sockets use
/// the same port.
fn bind_all(addresses: &[SocketAddr], bind: &impl BindSocket) -> io::Result<Vec<Socket>> {
    let has_several = addresses.len() > 1;
    let ipv6_only = if has_several {
        Ipv6Only::Yes
    } else {
        Ipv6Only::SystemDefault
    };
    let mut bound: Vec<Socket> = Vec::new();
    let mut unavailable = None;
    for address in addresses {
        let mut address = *address;
        if let Some(first) = bound
            .first()
            .and_then(|first| first.local_addr().ok()?.as_socket())
        {
            address.set_port(first.port());
        }
        match bind(address, ipv6_only) {
            Ok(socket) => bound.push(socket),
            Err(error) if is_unavailable(&error) => {
                if has_several {
                    tracing::warn!(%address, %error, "cannot bind an address of the host; skipping it");
                }
                unavailable = Some(error);
            }
            Err(error) if has_several => {
                return Err(io::Error::new(error.kind(), format!("{address}: {error}")));
            }
            Err(error) => return Err(error),
        }
    }
    if bound.is_empty() {
        let message = "the host name has no address";
        return Err(
            unavailable.unwrap_or_else(|| io::Error::new(ErrorKind::AddrNotAvailable, message))
        );
    }
    Ok(bound)
}

/// Returns true if this machine does not have the address, or does not support its address family.
fn is_unavailable(error: &io::Error) -> bool {
    let no_such_family = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(no_such_family)
}

fn bind_one(address: SocketAddr, ipv6_only: Ipv6Only) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && ipv6_only == Ipv6Only::Yes {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn address(ip: &str, port: u16) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), port)
    }

    fn local_ports(sockets: &[Socket]) -> Vec<u16> {
        let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
        sockets.iter().map(port).collect()
    }

    /// Binds like a machine without IPv6.
    fn without_ipv6(address: SocketAddr, ipv6_only: Ipv6Only) -> io::Result<Socket> {
        if address.is_ipv6() {
            let errno = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
            return Err(io::Error::from_raw_os_error(errno));
        }
        bind_one(address, ipv6_only)
    }

    #[test]
    fn an_unavailable_address_is_skipped() {
        let both = [address("::1", 0), address("127.0.0.1", 0)];
        assert_eq!(bind_all(&both, &without_ipv6).unwrap().len(), 1);
        // A documentation address, which no machine has.
        let foreign = [address("192.0.2.1", 0), address("127.0.0.1", 0)];
        assert_eq!(bind_all(&foreign, &bind_one).unwrap().len(), 1);
    }

    #[test]
    fn a_host_with_no_available_address_is_an_error() {
        let error = bind_all(&[address("::1", 0)], &without_ipv6).unwrap_err();
        assert!(is_unavailable(&error), "{error}");
        assert!(bind_all(&[], &bind_one).is_err());
    }

    #[tokio::test]
    async fn a_port_in_use_at_one_address_is_an_error() {
        let taken = bind_one(address("127.0.0.2", 0), Ipv6Only::SystemDefault).unwrap();
        taken.listen(1).unwrap();
        let port = local_ports(std::slice::from_ref(&taken))[0];
        let both = [address("127.0.0.1", port), address("127.0.0.2", port)];
        let error = bind(&both).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert!(error.to_string().starts_with("127.0.0.2:"), "{error}");
    }

    #[test]
    fn port_0_binds_the_same_free_port_at_every_address() {
        let calls = Cell::new(0);
        // The first chosen port is in use at the second address.
        let contended = |address: SocketAddr, ipv6_only: Ipv6Only| {
            calls.set(calls.get() + 1);
            if calls.get() == 2 {
                return Err(ErrorKind::AddrInUse.into());
            }
            bind_one(address, ipv6_only)
        };
        let both = [address("127.0.0.1", 0), address("127.0.0.2", 0)];
        let bound = bind_at_one_port(&both, &contended).unwrap();
        let [first, second] = local_ports(&bound)[..] else {
            panic!("expected two sockets")
        };
        assert_eq!((first, calls.get()), (second, 4));
    }
}
