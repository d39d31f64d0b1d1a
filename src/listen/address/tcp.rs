//! Binding every TCP address of a host.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use super::BACKLOG;

/// How often a free port is looked for that is free at every address.
const MAX_PORT_ATTEMPTS: usize = 16;

/// Binds a socket; tests bind as another machine would.
trait Bind: Fn(SocketAddr, Ipv6Only) -> io::Result<Socket> {}

impl<F: Fn(SocketAddr, Ipv6Only) -> io::Result<Socket>> Bind for F {}

/// Whether a socket of IPv6 may take IPv4's connections, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ipv6Only {
    /// As the system has it.
    Default,
    /// It may not: the host's IPv4 address has a socket of its own.
    Own,
}

/// Binds all of these addresses, which have the same port. Port 0 takes one that is free at all of them.
/// An address that this machine does not have is passed over, so long as there is another: a host name may
/// have an IPv6 address where IPv6 is switched off.
pub(super) fn bind(addresses: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let mut addresses = addresses.to_vec();
    addresses.sort_by_key(SocketAddr::is_ipv4);
    addresses.dedup();
    let bound = bind_at_one_port(&addresses, &bind_one)?;
    bound
        .into_iter()
        .map(|socket| {
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        })
        .collect()
}

/// Binds each address. Where any port will do, another is tried if it is taken at one of them.
fn bind_at_one_port(addresses: &[SocketAddr], bind: &impl Bind) -> io::Result<Vec<Socket>> {
    let is_any_port = addresses.iter().all(|address| address.port() == 0);
    let mut tries = if is_any_port { MAX_PORT_ATTEMPTS } else { 1 };
    loop {
        tries -= 1;
        match bind_all(addresses, bind) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && tries > 0 => {}
            bound => return bound,
        }
    }
}

/// Binds each address once. Where the port is 0, the first address chooses it for all.
fn bind_all(addresses: &[SocketAddr], bind: &impl Bind) -> io::Result<Vec<Socket>> {
    let is_one_of_many = addresses.len() > 1;
    let family = if is_one_of_many {
        Ipv6Only::Own
    } else {
        Ipv6Only::Default
    };
    let mut bound: Vec<Socket> = Vec::new();
    let mut passed_over = None;
    for address in addresses {
        let mut address = *address;
        if let Some(first) = bound
            .first()
            .and_then(|first| first.local_addr().ok()?.as_socket())
        {
            address.set_port(first.port());
        }
        match bind(address, family) {
            Ok(socket) => bound.push(socket),
            Err(error) if is_unavailable(&error) => {
                if is_one_of_many {
                    tracing::warn!(%address, %error, "an address of the host is not listened on");
                }
                passed_over = Some(error);
            }
            Err(error) if is_one_of_many => {
                return Err(io::Error::new(error.kind(), format!("{address}: {error}")));
            }
            Err(error) => return Err(error),
        }
    }
    if bound.is_empty() {
        let message = "the host has no address";
        return Err(
            passed_over.unwrap_or_else(|| io::Error::new(ErrorKind::AddrNotAvailable, message))
        );
    }
    Ok(bound)
}

/// Whether this machine does not have the address, or no address of its family.
fn is_unavailable(error: &io::Error) -> bool {
    let no_such_family = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(no_such_family)
}

fn bind_one(address: SocketAddr, family: Ipv6Only) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && family == Ipv6Only::Own {
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

    fn ports(sockets: &[Socket]) -> Vec<u16> {
        let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port();
        sockets.iter().map(port).collect()
    }

    /// A machine without IPv6.
    fn without_ipv6(address: SocketAddr, family: Ipv6Only) -> io::Result<Socket> {
        if address.is_ipv6() {
            let errno = rustix::io::Errno::AFNOSUPPORT.raw_os_error();
            return Err(io::Error::from_raw_os_error(errno));
        }
        bind_one(address, family)
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
        let taken = bind_one(address("127.0.0.2", 0), Ipv6Only::Default).unwrap();
        taken.listen(1).unwrap();
        let port = ports(std::slice::from_ref(&taken))[0];
        let both = [address("127.0.0.1", port), address("127.0.0.2", port)];
        let error = bind(&both).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert!(error.to_string().starts_with("127.0.0.2:"), "{error}");
    }

    #[test]
    fn port_0_binds_the_same_free_port_at_every_address() {
        let tries = Cell::new(0);
        // Somebody else has the second address's port at the first try.
        let contended = |address: SocketAddr, family: Ipv6Only| {
            tries.set(tries.get() + 1);
            if tries.get() == 2 {
                return Err(ErrorKind::AddrInUse.into());
            }
            bind_one(address, family)
        };
        let both = [address("127.0.0.1", 0), address("127.0.0.2", 0)];
        let bound = bind_at_one_port(&both, &contended).unwrap();
        let [first, second] = ports(&bound)[..] else {
            panic!("two sockets")
        };
        assert_eq!((first, tries.get()), (second, 4));
    }
}
