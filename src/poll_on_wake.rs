//! A wrapper for futures that rarely become ready, such as timers, within tasks that are polled for every token.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::FuturesUnordered;
use tokio_stream::Stream;

/// Polls a future once, and after that only when the future's waker has been called.
///
/// A task that is polled for every token can then hold a timer or a signal at almost no cost per token.
pub(crate) struct PollOnWake<F>(FuturesUnordered<F>);

impl<F: Future> PollOnWake<F> {
    /// Wraps `future`.
    #[must_use]
    pub(crate) fn new(future: F) -> Self {
        Self(FuturesUnordered::from_iter([future]))
    }

    /// Returns the future's output once it is ready. After that, every call returns `Pending`.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<F::Output> {
        match Pin::new(&mut self.0).poll_next(cx) {
            Poll::Ready(Some(output)) => Poll::Ready(output),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// Waits for the future's output.
    pub(crate) async fn ready(&mut self) -> F::Output {
        poll_fn(|cx| self.poll(cx)).await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::task::Waker;

    use tokio::sync::Notify;

    use super::*;

    #[test]
    fn the_future_is_polled_once_and_again_after_a_wake_up() {
        let (polls, wake) = (Cell::new(0), Notify::new());
        let mut notified = Box::pin(wake.notified());
        let mut future = PollOnWake::new(poll_fn(|cx| {
            polls.set(polls.get() + 1);
            notified.as_mut().poll(cx)
        }));
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            assert_eq!(future.poll(&mut cx), Poll::Pending);
        }
        assert_eq!(polls.get(), 1);
        wake.notify_waiters();
        assert_eq!(future.poll(&mut cx), Poll::Ready(()));
        assert_eq!(polls.get(), 2);
        assert_eq!(future.poll(&mut cx), Poll::Pending);
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_ends_the_wait() {
        let mut timer = PollOnWake::new(tokio::time::sleep(std::time::Duration::from_secs(1)));
        timer.ready().await;
    }
}
