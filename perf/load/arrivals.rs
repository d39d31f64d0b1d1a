//! When streams are due to begin: evenly spaced on an absolute schedule, so that neither a late sender nor
//! a slow answer moves what comes after.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokenway::runner::monotonic_ns;
use tokio::io::unix::AsyncFd;

/// Tells of each beginning when it is due. The kernel's timer is late by microseconds, the runtime's by
/// up to a millisecond.
pub(super) struct Arrivals {
    schedule: Schedule,
    timer: AsyncFd<OwnedFd>,
}

/// The beginnings of some streams.
struct Schedule {
    began_ns: u64,
    spread: Duration,
    streams: u32,
    next: u32,
}

impl Arrivals {
    /// The first is due now.
    pub(super) fn begin(streams: u32, spread: Duration) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe, for types whose descriptor changes; this one is owned"
        )]
        let timer = AsyncFd::new(timer)?;
        Ok(Self {
            schedule: Schedule {
                began_ns: monotonic_ns(),
                spread,
                streams,
                next: 0,
            },
            timer,
        })
    }

    /// Waits until the next stream is due, and says since when that is so; `None` after the last.
    pub(super) async fn next(&mut self) -> io::Result<Option<u64>> {
        let Some(due_ns) = self.schedule.next() else {
            return Ok(None);
        };
        if monotonic_ns() < due_ns {
            self.set(due_ns)?;
        }
        while monotonic_ns() < due_ns {
            let mut expired = self.timer.readable().await?;
            expired.clear_ready();
        }
        Ok(Some(due_ns))
    }

    /// Setting the timer also forgets what it told before.
    fn set(&self, due_ns: u64) -> io::Result<()> {
        let due = Timespec::try_from(Duration::from_nanos(due_ns)).map_err(io::Error::other)?;
        let never = Timespec::default();
        let once = Itimerspec {
            it_interval: never,
            it_value: due,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once)?;
        Ok(())
    }
}

impl Iterator for Schedule {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.next == self.streams {
            return None;
        }
        let after = self.spread * self.next / self.streams;
        self.next += 1;
        let after_ns = u64::try_from(after.as_nanos()).expect("a run lasts no centuries");
        Some(self.began_ns + after_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_are_evenly_spaced_from_the_first() {
        let schedule = Schedule {
            began_ns: 7,
            spread: Duration::from_nanos(1_000),
            streams: 3,
            next: 0,
        };
        assert_eq!(schedule.collect::<Vec<_>>(), [7, 340, 673]);
    }

    #[tokio::test]
    async fn none_is_told_before_it_is_due_and_a_late_one_delays_no_other() {
        let spread = Duration::from_millis(8);
        let mut arrivals = Arrivals::begin(4, spread).unwrap();
        let first = arrivals.next().await.unwrap().unwrap();
        // A sender that is held up for two of them finds both due, at their own times.
        tokio::time::sleep(spread / 2).await;
        for stream in 1..4 {
            let due_ns = arrivals.next().await.unwrap().unwrap();
            assert_eq!(due_ns, first + stream * 2_000_000);
            assert!(monotonic_ns() >= due_ns);
        }
        assert_eq!(arrivals.next().await.unwrap(), None);
    }
}
