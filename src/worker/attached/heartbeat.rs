//! How long nothing has come of a worker, and when that is too long.

use std::time::Duration;

use tokio::time::Instant;

use super::timeouts::SessionTimeouts;

/// An alarm that rings so late was held up, and all else of this process with it.
const LATE: Duration = Duration::from_millis(20);

/// How long nothing has come of a worker.
pub(super) struct HeartbeatMonitor {
    timeout: Duration,
    /// Time between two heartbeats.
    heartbeat_interval: Duration,
    /// When it is too long.
    ends: Instant,
    /// Whether it was let go on because the engine stood still. It is once: an engine that is always late loses
    /// its silent workers, too.
    is_prolonged: bool,
}

impl HeartbeatMonitor {
    /// Begins now, and may last as long as these timeouts say.
    pub(super) fn new(timeouts: &SessionTimeouts, now: Instant) -> Self {
        let timeout = timeouts.heartbeat_timeout;
        Self {
            timeout,
            heartbeat_interval: timeouts.heartbeat_interval,
            ends: now + timeout,
            is_prolonged: false,
        }
    }

    /// When to look at the clock next: when it is too long, and in between as often as for a worker that declared no
    /// silence, because the session checks its other timeouts then, too.
    pub(super) fn next_look(&self, now: Instant) -> Instant {
        self.ends.min(now + self.heartbeat_interval * 4)
    }

    /// Something has come.
    pub(super) fn broken(&mut self, now: Instant) {
        self.ends = now + self.timeout;
        self.is_prolonged = false;
    }

    /// Whether it is too long, by an alarm that was due then. An engine that stood still itself has not yet read what
    /// was said meanwhile, and waits for as long as a heartbeat takes.
    pub(super) fn is_too_long(&mut self, due: Instant, now: Instant) -> bool {
        if !self.is_prolonged && now >= self.ends && now.saturating_duration_since(due) > LATE {
            self.is_prolonged = true;
            self.ends = now + self.heartbeat_interval;
        }
        now >= self.ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::attached::WorkerTimeouts;

    const TIMEOUT: Duration = Duration::from_secs(2);

    fn silence(now: Instant) -> HeartbeatMonitor {
        declared(None, now)
    }

    fn declared(silence: Option<Duration>, now: Instant) -> HeartbeatMonitor {
        let engine = WorkerTimeouts {
            heartbeat_timeout: TIMEOUT,
            step_limit: None,
            tokenizer_call_timeout: TIMEOUT,
        };
        HeartbeatMonitor::new(&SessionTimeouts::new(engine, silence), now)
    }

    #[test]
    fn a_worker_without_messages_times_out() {
        let began = Instant::now();
        let mut silence = silence(began);
        assert!(!silence.is_too_long(began, began));
        silence.broken(began + TIMEOUT / 2);
        let due = silence.ends;
        assert_eq!(due, began + TIMEOUT * 3 / 2);
        let a_moment_later = due + Duration::from_millis(1);
        assert!(silence.is_too_long(due, a_moment_later));
    }

    #[test]
    fn a_stalled_engine_extends_the_timeout_by_one_heartbeat() {
        let began = Instant::now();
        let mut silence = silence(began);
        let (due, awake) = (silence.ends, began + TIMEOUT * 2);
        assert!(!silence.is_too_long(due, awake));
        let due = silence.ends;
        assert_eq!(due, awake + TIMEOUT / 4);
        assert!(silence.is_too_long(due, due));
    }

    #[test]
    fn an_engine_that_is_always_late_loses_only_silent_workers() {
        let began = Instant::now();
        let mut silence = silence(began);
        for _ in 0..2 {
            let due = silence.ends;
            assert!(!silence.is_too_long(due, due + TIMEOUT));
            silence.broken(due + TIMEOUT);
        }
        let due = silence.ends;
        assert!(!silence.is_too_long(due, due + TIMEOUT));
        let due = silence.ends;
        assert!(silence.is_too_long(due, due + TIMEOUT));
    }

    #[test]
    fn a_long_declared_timeout_is_checked_often_and_ends_on_time() {
        let began = Instant::now();
        let declares = Duration::from_secs(60);
        let mut silence = declared(Some(declares), began);
        let mut now = began;
        while now < began + declares {
            assert!(!silence.is_too_long(now, now));
            let next = silence.next_look(now);
            assert!(next <= now + TIMEOUT);
            now = next;
        }
        assert_eq!(now, began + declares);
        assert!(silence.is_too_long(now, now));
    }
}
