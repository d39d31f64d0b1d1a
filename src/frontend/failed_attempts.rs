//! Counts failed authentications per address, and delays the responses to addresses that fail often.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::listen::network;

/// Number of failures of an address that are answered without a delay, if it has had none for a while.
const BURST: u32 = 10;

/// Time after which one more failure is answered without a delay.
const INTERVAL: Duration = Duration::from_secs(1);

/// Maximum delay of a response.
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Maximum number of addresses whose failures are counted one by one. All further addresses are counted together.
const MAX_ADDRESSES: usize = 10_000;

/// Failed authentications of the last minutes. A valid key is never delayed.
#[derive(Default)]
pub(super) struct FailedAttempts {
    /// For each address, the time until which its failures are paid off, at one per [`INTERVAL`].
    busy_until: Mutex<HashMap<Option<IpAddr>, Instant>>,
}

impl FailedAttempts {
    /// Counts a failure, and returns the time by which to delay its response. Clients on a Unix socket have no address
    /// and are counted together.
    pub(super) fn record(&self, peer: Option<IpAddr>, now: Instant) -> Duration {
        let mut all = self
            .busy_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut peer = peer.map(network);
        if !all.contains_key(&peer) && all.len() >= MAX_ADDRESSES {
            all.retain(|_, until| *until > now);
            if all.len() >= MAX_ADDRESSES {
                peer = None;
            }
        }
        let until = all.entry(peer).or_insert(now);
        let ahead = (*until).max(now) - now;
        let delay = (ahead + INTERVAL).saturating_sub(INTERVAL * BURST);
        let delay = delay.min(MAX_DELAY);
        *until = now + (ahead + INTERVAL).min(INTERVAL * BURST + MAX_DELAY);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn an_address_that_fails_often_is_delayed_and_others_are_not() {
        let (attempts, now) = (FailedAttempts::default(), Instant::now());
        let mut delays = (0..20).map(|_| attempts.record(address("10.0.0.1"), now));
        assert!(delays.by_ref().take(10).all(|delay| delay.is_zero()));
        let seconds: Vec<_> = delays.map(|delay| delay.as_secs()).collect();
        assert_eq!(seconds, [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]);
        assert!(attempts.record(address("10.0.0.2"), now).is_zero());
        assert!(attempts.record(None, now).is_zero());
        let later = now + Duration::from_secs(15);
        assert!(attempts.record(address("10.0.0.1"), later).is_zero());
    }

    #[test]
    fn the_addresses_of_an_ipv6_network_are_counted_together() {
        let (attempts, now) = (FailedAttempts::default(), Instant::now());
        for host in 1..=10 {
            let delay = attempts.record(address(&format!("2001:db8::{host}")), now);
            assert!(delay.is_zero());
        }
        assert!(!attempts.record(address("2001:db8::ffff:1"), now).is_zero());
        assert!(attempts.record(address("2001:db8:0:1::1"), now).is_zero());
        assert!(attempts.record(address("::ffff:10.0.0.1"), now).is_zero());
    }

    #[test]
    fn the_number_of_counted_addresses_is_bounded() {
        let (attempts, now) = (FailedAttempts::default(), Instant::now());
        let count = u32::try_from(MAX_ADDRESSES).unwrap();
        for host in 0..count + 20 {
            attempts.record(Some(IpAddr::V4(host.into())), now);
        }
        let len = || attempts.busy_until.lock().unwrap().len();
        assert_eq!(len(), MAX_ADDRESSES + 1);
        let new = attempts.record(address("10.0.0.1"), now);
        assert!(!new.is_zero(), "further addresses are counted together");
        attempts.record(address("10.0.0.1"), now + Duration::from_secs(60));
        assert_eq!(len(), 1);
    }
}
