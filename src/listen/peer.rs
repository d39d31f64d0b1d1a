//! The address of the peer of a connection, as a request extension.

use std::net::{IpAddr, SocketAddr};

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
