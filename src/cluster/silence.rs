//! Measures how long an engine has sent nothing, at almost no cost per event.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::poll_on_wake::PollOnWake;

/// The time since an engine's last event, while the stream waits for the next.
pub(super) struct SilenceTimer {
    /// Start of the silence. `None` after an event, until the stream waits again: a stream that nobody reads is not
    /// silent.
    since: Option<Instant>,
    /// Fires at the end of the limit that was in force when it was set. Events do not reset it.
    timer: Option<(Instant, PollOnWake<Pin<Box<Sleep>>>)>,
}

impl SilenceTimer {
    /// Starts to measure the silence at this time.
    pub(super) fn new(since: Instant) -> Self {
        Self {
            since: Some(since),
            timer: None,
        }
    }

    /// Records that the silence has ended.
    pub(super) fn record_event(&mut self) {
        self.since = None;
    }

    /// Completes when the silence has lasted for `limit`. To be called while the stream waits for an event.
    pub(super) fn poll(&mut self, limit: Duration, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let end = since + limit;
        loop {
            let (set_for, timer) = self
                .timer
                .get_or_insert_with(|| (end, PollOnWake::new(Box::pin(sleep_until(end)))));
            if *set_for > end {
                // The limit has become shorter.
                self.timer = None;
                continue;
            }
            let fired_for = *set_for;
            if timer.poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timer = None;
            if fired_for >= end {
                return Poll::Ready(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{advance, timeout};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    async fn silent_after(timer: &mut SilenceTimer, limit: Duration) -> Duration {
        let start = Instant::now();
        poll_fn(|cx| timer.poll(limit, cx)).await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn each_event_starts_the_limit_again() {
        let mut timer = SilenceTimer::new(Instant::now());
        for _ in 0..5 {
            let waiting = silent_after(&mut timer, LIMIT);
            assert!(
                timeout(LIMIT - Duration::from_secs(1), waiting)
                    .await
                    .is_err()
            );
            timer.record_event();
        }
        let silence = silent_after(&mut timer, LIMIT).await;
        assert!(
            silence >= LIMIT && silence < LIMIT + Duration::from_secs(1),
            "{silence:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nobody_reads_is_not_silent() {
        let mut timer = SilenceTimer::new(Instant::now());
        timer.record_event();
        advance(LIMIT * 3).await;
        assert!(silent_after(&mut timer, LIMIT).await >= LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shorter_limit_is_applied_at_once() {
        let mut timer = SilenceTimer::new(Instant::now());
        let waiting = silent_after(&mut timer, LIMIT * 10);
        assert!(timeout(LIMIT, waiting).await.is_err());
        assert!(silent_after(&mut timer, LIMIT * 2).await <= LIMIT + Duration::from_secs(1));
    }
}
