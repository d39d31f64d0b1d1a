//! Limits on the number of open connections: in all, and of each address.
//!
//! A connection beyond a limit is closed at once, without a response: to send one, the server would have to keep the
//! connection open until it has read the first bytes and knows the protocol. Clients see a failed connection, and most
//! of them retry.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Limits;
use super::peer::network;
use crate::telemetry::ConnectionLimit;

/// Minimum time between two log lines about refused connections.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The open connections of one or more listeners, which count toward the same limits. Clones share them.
#[derive(Clone)]
pub(crate) struct ConnectionLimits(Arc<Shared>);

struct Shared {
    max: u32,
    max_per_address: u32,
    open: Mutex<OpenConnections>,
}

#[derive(Default)]
struct OpenConnections {
    total: u32,
    /// Number of connections of each IPv4 address and IPv6 /64 network, except loopback addresses.
    by_network: HashMap<IpAddr, u32>,
    /// Number of connections that were refused since the last log line.
    refused: u64,
    logged_at: Option<Instant>,
}

/// Counts a connection as open until it is dropped.
pub(super) struct OpenConnection {
    limits: ConnectionLimits,
    network: Option<IpAddr>,
}

impl ConnectionLimits {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self(Arc::new(Shared {
            max: limits.max_connections,
            max_per_address: limits.max_connections_per_address,
            open: Mutex::default(),
        }))
    }

    /// Counts a new connection.
    ///
    /// # Errors
    /// The limit that the connection exceeds.
    pub(super) fn open(&self, peer: Option<SocketAddr>) -> Result<OpenConnection, ConnectionLimit> {
        // All clients of a reverse proxy on this machine have a loopback address.
        let network = peer
            .map(|peer| network(peer.ip()))
            .filter(|network| !network.is_loopback());
        let mut open = self.lock();
        if open.total >= self.0.max {
            open.log_refusal("--max-connections", self.0.max);
            return Err(ConnectionLimit::Total);
        }
        if let Some(network) = network {
            let count = open.by_network.get(&network).copied().unwrap_or(0);
            if count >= self.0.max_per_address {
                open.log_refusal("--max-connections-per-address", self.0.max_per_address);
                return Err(ConnectionLimit::Address);
            }
            open.by_network.insert(network, count + 1);
        }
        open.total += 1;
        Ok(OpenConnection {
            limits: self.clone(),
            network,
        })
    }

    fn lock(&self) -> MutexGuard<'_, OpenConnections> {
        let open = self.0.open.lock();
        open.unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenConnections {
    fn close(&mut self, network: Option<IpAddr>) {
        self.total -= 1;
        let Some(network) = network else {
            return;
        };
        if let Some(count) = self.by_network.get_mut(&network) {
            *count -= 1;
            if *count == 0 {
                self.by_network.remove(&network);
            }
        }
    }

    /// Logs that a connection was refused, at most once per [`LOG_INTERVAL`].
    fn log_refusal(&mut self, setting: &'static str, limit: u32) {
        self.refused += 1;
        let now = Instant::now();
        if self.logged_at.is_some_and(|at| now - at < LOG_INTERVAL) {
            return;
        }
        let refused = self.refused;
        tracing::warn!(
            setting,
            limit,
            refused,
            "refusing connections: a limit is reached"
        );
        self.refused = 0;
        self.logged_at = Some(now);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.limits.lock().close(self.network);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max: u32, max_per_address: u32) -> ConnectionLimits {
        ConnectionLimits::new(&Limits {
            max_connections: max,
            max_connections_per_address: max_per_address,
            ..Limits::default()
        })
    }

    fn peer(address: &str) -> Option<SocketAddr> {
        Some(SocketAddr::new(address.parse().expect("an address"), 1))
    }

    /// Opens connections until one is refused. Returns those that were opened, and the limit.
    fn open_all(limits: &ConnectionLimits, address: &str) -> (usize, Option<ConnectionLimit>) {
        let mut opened = Vec::new();
        while opened.len() < 100 {
            match limits.open(peer(address)) {
                Ok(connection) => opened.push(connection),
                Err(limit) => return (opened.len(), Some(limit)),
            }
        }
        (opened.len(), None)
    }

    #[test]
    fn the_connections_of_an_address_are_limited_and_loopback_is_exempt() {
        let limits = limits(1_000, 3);
        let of_address = (3, Some(ConnectionLimit::Address));
        for _ in 0..2 {
            assert_eq!(open_all(&limits, "10.0.0.1"), of_address);
            assert!(limits.lock().by_network.is_empty(), "they were closed");
        }
        for address in ["127.0.0.1", "::1", "::ffff:127.0.0.2"] {
            assert_eq!(open_all(&limits, address), (100, None));
        }
    }

    #[test]
    fn the_addresses_of_an_ipv6_network_share_their_limit() {
        let limits = limits(1_000, 3);
        let _one = limits.open(peer("2001:db8::1"));
        let _another = limits.open(peer("2001:db8::ffff:2"));
        assert_eq!(open_all(&limits, "2001:db8::3").0, 1);
        assert_eq!(open_all(&limits, "2001:db8:0:1::3").0, 3);
    }

    #[test]
    fn the_connections_of_all_addresses_are_limited() {
        let limits = limits(5, 4);
        let _unix = limits.open(None);
        let _loopback = limits.open(peer("127.0.0.1"));
        let of_all = (3, Some(ConnectionLimit::Total));
        assert_eq!(open_all(&limits, "10.0.0.1"), of_all);
        assert_eq!(open_all(&limits, "127.0.0.1"), of_all);
    }
}
