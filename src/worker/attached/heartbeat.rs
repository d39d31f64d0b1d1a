//! The heartbeat timeout of one worker. It expires when the worker has sent no message for too long.

use std::time::Duration;

use tokio::time::Instant;

use super::timeouts::SessionTimeouts;

/// If a timer fires later than this, the whole engine process was stalled.
const STALL_THRESHOLD: Duration = Duration::from_millis(20);

/// Tracks the time since a worker's last message.
pub(super) struct HeartbeatMonitor {
    timeout: Duration,
    /// Time between two heartbeats.
    heartbeat_interval: Duration,
    /// Time at which the worker counts as lost if it sends nothing.
    deadline: Instant,
    /// True if the deadline was extended because the engine was stalled. Each message allows only one extension, so
    /// that an engine that is always late still detects silent workers.
    was_extended: bool,
}

impl HeartbeatMonitor {
    /// Starts the heartbeat timeout at `now`.
    pub(super) fn new(timeouts: &SessionTimeouts, now: Instant) -> Self {
        let timeout = timeouts.heartbeat_timeout;
        Self {
            timeout,
            heartbeat_interval: timeouts.heartbeat_interval,
            deadline: now + timeout,
            was_extended: false,
        }
    }

    /// Returns the time at which the session must check its timeouts next. The session checks all of them at one
    /// timer, so the timer also fires every four heartbeat intervals if the heartbeat's deadline is later.
    pub(super) fn next_check(&self, now: Instant) -> Instant {
        self.deadline.min(now + self.heartbeat_interval * 4)
    }

    /// Restarts the timeout, because a message has arrived.
    pub(super) fn record_message(&mut self, now: Instant) {
        self.deadline = now + self.timeout;
        self.was_extended = false;
    }

    /// Returns true if the heartbeat timeout has expired. `due` is the time at which the caller's timer was set to
    /// fire.
    ///
    /// If the timer fires late, the engine was stalled and may not have read messages that have already arrived. The
    /// timeout is then extended by one heartbeat interval.
    pub(super) fn has_expired(&mut self, due: Instant, now: Instant) -> bool {
        if !self.was_extended
            && now >= self.deadline
            && now.saturating_duration_since(due) > STALL_THRESHOLD
        {
            self.was_extended = true;
            self.deadline = now + self.heartbeat_interval;
        }
        now >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::attached::WorkerTimeouts;

    const TIMEOUT: Duration = Duration::from_secs(2);

    fn monitor(now: Instant) -> HeartbeatMonitor {
        monitor_with(None, now)
    }

    fn monitor_with(declared_timeout: Option<Duration>, now: Instant) -> HeartbeatMonitor {
        let engine = WorkerTimeouts {
            heartbeat_timeout: TIMEOUT,
            step_limit: None,
            tokenizer_call_timeout: TIMEOUT,
        };
        HeartbeatMonitor::new(&SessionTimeouts::new(engine, declared_timeout), now)
    }

    #[test]
    fn a_worker_without_messages_times_out() {
        let start = Instant::now();
        let mut monitor = monitor(start);
        assert!(!monitor.has_expired(start, start));
        monitor.record_message(start + TIMEOUT / 2);
        let due = monitor.deadline;
        assert_eq!(due, start + TIMEOUT * 3 / 2);
        let a_moment_later = due + Duration::from_millis(1);
        assert!(monitor.has_expired(due, a_moment_later));
    }

    #[test]
    fn a_stalled_engine_extends_the_timeout_by_one_heartbeat() {
        let start = Instant::now();
        let mut monitor = monitor(start);
        let (due, awake) = (monitor.deadline, start + TIMEOUT * 2);
        assert!(!monitor.has_expired(due, awake));
        let due = monitor.deadline;
        assert_eq!(due, awake + TIMEOUT / 4);
        assert!(monitor.has_expired(due, due));
    }

    #[test]
    fn an_engine_that_is_always_late_loses_only_silent_workers() {
        let start = Instant::now();
        let mut monitor = monitor(start);
        for _ in 0..2 {
            let due = monitor.deadline;
            assert!(!monitor.has_expired(due, due + TIMEOUT));
            monitor.record_message(due + TIMEOUT);
        }
        let due = monitor.deadline;
        assert!(!monitor.has_expired(due, due + TIMEOUT));
        let due = monitor.deadline;
        assert!(monitor.has_expired(due, due + TIMEOUT));
    }

    #[test]
    fn a_long_declared_timeout_is_checked_often_and_ends_on_time() {
        let start = Instant::now();
        let declared = Duration::from_secs(60);
        let mut monitor = monitor_with(Some(declared), start);
        let mut now = start;
        while now < start + declared {
            assert!(!monitor.has_expired(now, now));
            let next = monitor.next_check(now);
            assert!(next <= now + TIMEOUT);
            now = next;
        }
        assert_eq!(now, start + declared);
        assert!(monitor.has_expired(now, now));
    }
}
