//! The idle connections to one engine.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;

/// Time after which an idle connection is not used again, and is closed by the next use of the pool. It is shorter than the idle timeouts of common servers, so that a
/// request is rarely sent on a connection that the server closes at the same moment.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum number of idle connections.
const MAX_CONNECTIONS: usize = 256;

/// Connections that wait for a request. The check of the engine's health, which takes one every few seconds, also
/// closes those that have waited for too long.
#[derive(Default)]
pub(super) struct ConnectionPool {
    /// The connection that was used last is the last in the list.
    idle: Mutex<Vec<IdleConnection>>,
}

struct IdleConnection {
    connection: Connection,
    since: Instant,
}

impl ConnectionPool {
    /// Takes the connection that was used last. Returns `None` if there is none that is open.
    pub(super) fn take(&self) -> Option<Connection> {
        loop {
            let mut connection = self.pop()?;
            if connection.is_open() {
                return Some(connection);
            }
        }
    }

    fn pop(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let first_fresh = idle.partition_point(|it| now - it.since > IDLE_TIMEOUT);
        let expired: Vec<_> = idle.drain(..first_fresh).collect();
        let latest = idle.pop();
        // The sockets are closed after the lock is released.
        drop(idle);
        drop(expired);
        latest.map(|it| it.connection)
    }

    /// Adds a connection whose last response has been read to its end. It is closed if it cannot take a request, or if
    /// there are enough others.
    pub(super) fn put(&self, mut connection: Connection) {
        if !connection.is_open() {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_CONNECTIONS {
            let since = Instant::now();
            idle.push(IdleConnection { connection, since });
        }
    }
}
