//! The address of the peer of a connection, as a request extension.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Address of the client that sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddress(Option<SocketAddr>);

impl PeerAddress {
    /// `None` stands for the peer of a Unix socket.
    pub(super) fn new(address: Option<SocketAddr>) -> Self {
        Self(address)
    }

    /// Returns the IP address. A client on a Unix socket has none.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.0.map(|address| address.ip())
    }
}

/// Returns an IPv4 address unchanged, and the /64 network of an IPv6 address, because a host usually has all its
/// addresses.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => address,
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}
