//! The timeouts of one remote worker. They are the engine's settings, extended by the heartbeat timeout that the
//! worker declares in its `hello`.
//!
//! A Python worker may hold the GIL during a device call and then sends nothing. Therefore no timeout
//! ends a worker before its declared heartbeat timeout has passed.

use std::time::Duration;

use crate::proto::worker as proto;

/// A worker is lost if it answers no tokenizer call for this many call timeouts. One slow prompt should fail only its
/// own request, not all running sequences of the worker.
const UNRESPONSIVE_FACTOR: u32 = 3;

/// Maximum wait for a worker's answer to a tokenizer call. `worker.proto` defines this value.
pub(crate) const TOKENIZER_CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The engine's timeouts for its workers.
#[derive(Clone, Copy, Debug)]
pub struct WorkerTimeouts {
    /// A worker that sends no message for this long counts as lost. Workers send four heartbeats in this time. A
    /// worker may declare a different timeout in its `hello`.
    pub heartbeat_timeout: Duration,
    /// Maximum duration of a device call; `None` means no limit.
    pub step_limit: Option<Duration>,
    /// Maximum wait for the answer to a tokenizer call. Always `TOKENIZER_CALL_TIMEOUT`, except in tests.
    pub tokenizer_call_timeout: Duration,
}

/// The timeouts of one worker's session.
#[derive(Clone, Copy, Debug)]
pub(super) struct SessionTimeouts {
    /// Interval between two heartbeats of the worker.
    pub(super) heartbeat_interval: Duration,
    /// Time without a message after which the worker is lost.
    pub(super) heartbeat_timeout: Duration,
    /// Maximum duration of a device call; `None` means no limit. It is at least the declared heartbeat timeout,
    /// because the engine cannot observe a device call while the worker is silent.
    pub(super) step_limit: Option<Duration>,
    /// Maximum time until the worker accepts or rejects a sequence; `None` means no limit. The worker may have to
    /// finish a device call first.
    pub(super) acceptance_timeout: Option<Duration>,
    /// Maximum time that a caller waits for the answer to a tokenizer call.
    pub(super) tokenizer_call_timeout: Duration,
    /// Time with open tokenizer calls and without an answer after which the worker is lost.
    pub(super) unresponsive_timeout: Duration,
}

impl SessionTimeouts {
    /// Combines the engine's timeouts with the heartbeat timeout that the worker declared, if it declared one.
    pub(super) fn new(engine: WorkerTimeouts, declared_timeout: Option<Duration>) -> Self {
        let heartbeat_timeout = declared_timeout.unwrap_or(engine.heartbeat_timeout);
        let declared = declared_timeout.unwrap_or_default();
        let step_limit = engine.step_limit.map(|limit| limit.max(declared));
        Self {
            // A worker sends four heartbeats per timeout. A longer declared timeout does not make them rarer, because
            // heartbeats also report the duration of device calls.
            heartbeat_interval: heartbeat_timeout.min(engine.heartbeat_timeout) / 4,
            heartbeat_timeout,
            step_limit,
            acceptance_timeout: step_limit.map(|limit| limit + heartbeat_timeout),
            tokenizer_call_timeout: engine.tokenizer_call_timeout,
            unresponsive_timeout: engine.tokenizer_call_timeout * UNRESPONSIVE_FACTOR + declared,
        }
    }

    /// Creates the first message to the worker.
    pub(super) fn welcome(&self) -> proto::Welcome {
        let milliseconds = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        proto::Welcome {
            heartbeat_interval_ms: milliseconds(self.heartbeat_interval),
            heartbeat_timeout_ms: milliseconds(self.heartbeat_timeout),
            step_limit_ms: self.step_limit.map_or(0, milliseconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINE: WorkerTimeouts = WorkerTimeouts {
        heartbeat_timeout: Duration::from_secs(2),
        step_limit: Some(Duration::from_secs(30)),
        tokenizer_call_timeout: Duration::from_secs(10),
    };

    #[test]
    fn a_worker_without_its_own_timeout_gets_the_engines_timeouts() {
        let timeouts = SessionTimeouts::new(ENGINE, None);
        assert_eq!(timeouts.heartbeat_timeout, ENGINE.heartbeat_timeout);
        assert_eq!(timeouts.step_limit, ENGINE.step_limit);
        assert_eq!(timeouts.acceptance_timeout, Some(Duration::from_secs(32)));
        assert_eq!(timeouts.unresponsive_timeout, Duration::from_secs(30));
        assert_eq!(
            timeouts.welcome(),
            proto::Welcome {
                heartbeat_interval_ms: 500,
                heartbeat_timeout_ms: 2_000,
                step_limit_ms: 30_000,
            }
        );
    }

    #[test]
    fn no_timeout_is_shorter_than_the_declared_heartbeat_timeout() {
        let declared = Duration::from_secs(60);
        let timeouts = SessionTimeouts::new(ENGINE, Some(declared));
        assert_eq!(timeouts.heartbeat_timeout, declared);
        assert_eq!(timeouts.step_limit, Some(declared));
        assert_eq!(timeouts.acceptance_timeout, Some(Duration::from_secs(120)));
        assert_eq!(timeouts.unresponsive_timeout, Duration::from_secs(90));
        assert_eq!(timeouts.heartbeat_interval, Duration::from_millis(500));
        let unlimited = WorkerTimeouts {
            step_limit: None,
            ..ENGINE
        };
        assert_eq!(
            SessionTimeouts::new(unlimited, Some(declared)).step_limit,
            None
        );
    }

    #[test]
    fn a_short_declared_timeout_shortens_the_heartbeat_interval() {
        let timeouts = SessionTimeouts::new(ENGINE, Some(Duration::from_millis(400)));
        assert_eq!(timeouts.heartbeat_interval, Duration::from_millis(100));
        assert_eq!(timeouts.step_limit, ENGINE.step_limit);
    }
}
