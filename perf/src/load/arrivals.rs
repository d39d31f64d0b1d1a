//! The start times of streams. They are evenly spaced on an absolute schedule, so that neither a late sender nor a
//! slow response delays the following starts.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokenway::runner::monotonic_ns;
use tokio::io::unix::AsyncFd;

/// Waits for each start time. The kernel's timer is late by microseconds, the runtime's by up to a millisecond.
pub(super) struct Arrivals {
    /// Start of the first stream, in nanoseconds of CLOCK_MONOTONIC.
    first_ns: u64,
    spread: Duration,
    streams: u32,
    next: u32,
    timer: AsyncFd<OwnedFd>,
}

impl Arrivals {
    /// Creates a schedule whose first stream is due now.
    pub(super) fn start(streams: u32, spread: Duration) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for types whose descriptor changes; this one is owned"
        )]
        let timer = AsyncFd::new(timer)?;
        Ok(Self {
            first_ns: monotonic_ns(),
            spread,
            streams,
            next: 0,
            timer,
        })
    }

    /// Waits until the next stream is due, and returns its start time; `None` after the last.
    pub(super) async fn wait_for_next(&mut self) -> io::Result<Option<u64>> {
        if self.next == self.streams {
            return Ok(None);
        }
        let after = self.spread * self.next / self.streams;
        let after_ns = u64::try_from(after.as_nanos()).expect("a run lasts less than centuries");
        let due_ns = self.first_ns + after_ns;
        self.next += 1;
        if monotonic_ns() < due_ns {
            self.set_timer(due_ns)?;
        }
        while monotonic_ns() < due_ns {
            let mut expired = self.timer.readable().await?;
            expired.clear_ready();
        }
        Ok(Some(due_ns))
    }

    /// Sets the timer, which also clears an earlier expiration.
    fn set_timer(&self, due_ns: u64) -> io::Result<()> {
        let due = Timespec::try_from(Duration::from_nanos(due_ns)).map_err(io::Error::other)?;
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: due,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_stream_starts_early_and_a_late_one_delays_no_other() {
        let spread = Duration::from_millis(8);
        let mut arrivals = Arrivals::start(4, spread).unwrap();
        let first = arrivals.wait_for_next().await.unwrap().unwrap();
        // Delay the sender until two more streams are due.
        while monotonic_ns() < first + 4_000_000 {}
        for stream in 1..4 {
            let due_ns = arrivals.wait_for_next().await.unwrap().unwrap();
            assert_eq!(due_ns, first + stream * 2_000_000);
            assert!(monotonic_ns() >= due_ns);
        }
        assert_eq!(arrivals.wait_for_next().await.unwrap(), None);
    }
}
