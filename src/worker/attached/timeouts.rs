//! SessionTimeouts of one attached worker: the engine's settings, stretched by the silence that the worker declared in its
//! `hello`.
//!
//! A worker whose device calls hold Python's interpreter sends nothing while such a call lasts. HeartbeatMonitor within the
//! declared limit is therefore never a reason to give the worker up, whichever timeout would see it.

use std::time::Duration;

use super::WorkerTimeouts;
use crate::proto::worker as proto;

/// A worker is lost when it leaves questions unanswered for this many times the time that one caller waits. A single
/// slow prompt ends its own caller only: the worker's sequences are worth more.
const UNRESPONSIVE_FACTOR: u32 = 3;

/// The timeouts that hold for one worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct SessionTimeouts {
    /// Time between two heartbeats of the worker.
    pub(super) heartbeat_interval: Duration,
    /// The worker is lost after this long without a message.
    pub(super) heartbeat_timeout: Duration,
    /// Longest call of the worker's device; `None` is no limit. Never below a declared silence, during which a call
    /// cannot be judged.
    pub(super) step_limit: Option<Duration>,
    /// Longest time in which the worker accepts or refuses a sequence; `None` is no limit. It may have to wait for the
    /// end of a device call.
    pub(super) acceptance_timeout: Option<Duration>,
    /// How long one caller waits for the answer to a question.
    pub(super) tokenizer_call_timeout: Duration,
    /// The worker is lost when it has questions and answers none for this long.
    pub(super) unresponsive_timeout: Duration,
}

impl SessionTimeouts {
    /// The timeouts of a worker that declared this silence, or none.
    pub(super) fn new(engine: WorkerTimeouts, declared_silence: Option<Duration>) -> Self {
        let heartbeat_timeout = declared_silence.unwrap_or(engine.heartbeat_timeout);
        let declared = declared_silence.unwrap_or_default();
        let step_limit = engine.step_limit.map(|limit| limit.max(declared));
        Self {
            // Four heartbeats in the shorter of both times: a worker that may be silent for long still reports the
            // length of its device calls as often as any other.
            heartbeat_interval: heartbeat_timeout.min(engine.heartbeat_timeout) / 4,
            heartbeat_timeout,
            step_limit,
            acceptance_timeout: step_limit.map(|limit| limit + heartbeat_timeout),
            tokenizer_call_timeout: engine.tokenizer_call_timeout,
            unresponsive_timeout: engine.tokenizer_call_timeout * UNRESPONSIVE_FACTOR + declared,
        }
    }

    /// The first message to the worker.
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
        let silence = Duration::from_secs(60);
        let timeouts = SessionTimeouts::new(ENGINE, Some(silence));
        assert_eq!(timeouts.heartbeat_timeout, silence);
        assert_eq!(timeouts.step_limit, Some(silence));
        assert_eq!(timeouts.acceptance_timeout, Some(Duration::from_secs(120)));
        assert_eq!(timeouts.unresponsive_timeout, Duration::from_secs(90));
        assert_eq!(timeouts.heartbeat_interval, Duration::from_millis(500));
        let unlimited = WorkerTimeouts {
            step_limit: None,
            ..ENGINE
        };
        assert_eq!(
            SessionTimeouts::new(unlimited, Some(silence)).step_limit,
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
