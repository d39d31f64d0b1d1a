//! The waker of a connection that is driven by the task that reads its response.
//!
//! hyper's connection and body wake each other for every frame. Both are polled by the same task, so these wake-ups would
//! only make the runtime poll the task again for nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Maximum number of polls in a row. Once the task's Tokio budget is used up, a socket returns `Pending` and wakes its
/// waker at once. Polling again cannot help until the task yields.
const MAX_POLLS: u32 = 4;

/// No poll is running.
const IDLE: u8 = 0;
/// A poll is running.
const POLLING: u8 = 1;
/// A poll is running, and there was a wake-up since it began.
const WOKEN: u8 = 2;

/// Wakes the task that polled last, unless a poll is running. A wake-up during a poll repeats the poll.
#[derive(Default)]
pub(super) struct PollWaker {
    task: AtomicWaker,
    state: AtomicU8,
}

impl PollWaker {
    /// Polls, and repeats the poll while it wakes itself, at most [`MAX_POLLS`] times.
    pub(super) fn poll<T>(
        self: &Arc<Self>,
        task: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.task.register(task.waker());
        let waker = Waker::from(Arc::clone(self));
        let mut cx = Context::from_waker(&waker);
        for _ in 0..MAX_POLLS {
            self.state.store(POLLING, Ordering::SeqCst);
            let result = poll(&mut cx);
            let was_woken = self.state.swap(IDLE, Ordering::SeqCst) == WOKEN;
            if result.is_ready() || !was_woken {
                return result;
            }
        }
        task.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Wake for PollWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let repeated =
            self.state
                .compare_exchange(POLLING, WOKEN, Ordering::SeqCst, Ordering::SeqCst);
        if repeated == Err(IDLE) {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct CountWakes(AtomicUsize);

    impl Wake for CountWakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Polls once. Returns the result, the number of calls, and the number of times that the task was woken.
    fn poll_with(mut poll: impl FnMut(u32, &Waker) -> Poll<()>) -> (Poll<()>, u32, usize) {
        let wakes = Arc::new(CountWakes::default());
        let task = Waker::from(Arc::clone(&wakes));
        let mut calls = 0;
        let result = Arc::<PollWaker>::default().poll(&Context::from_waker(&task), |cx| {
            calls += 1;
            poll(calls, cx.waker())
        });
        (result, calls, wakes.0.load(Ordering::SeqCst))
    }

    #[test]
    fn a_wake_up_during_a_poll_repeats_it_and_does_not_wake_the_task() {
        let polled = poll_with(|call, waker| {
            if call == 1 {
                waker.wake_by_ref();
            }
            Poll::Pending
        });
        assert_eq!(polled, (Poll::Pending, 2, 0));
    }

    #[test]
    fn a_poll_with_a_result_is_not_repeated() {
        let polled = poll_with(|_, waker| {
            waker.wake_by_ref();
            Poll::Ready(())
        });
        assert_eq!(polled, (Poll::Ready(()), 1, 0));
    }

    #[test]
    fn a_poll_that_always_wakes_itself_leaves_the_thread_to_other_tasks() {
        let polled = poll_with(|_, waker| {
            waker.wake_by_ref();
            Poll::Pending
        });
        assert_eq!(polled, (Poll::Pending, MAX_POLLS, 1));
    }

    #[test]
    fn a_wake_up_after_the_poll_wakes_the_task() {
        let wakes = Arc::new(CountWakes::default());
        let task = Waker::from(Arc::clone(&wakes));
        let mut kept = None;
        let polled = Arc::<PollWaker>::default().poll(&Context::from_waker(&task), |cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(wakes.0.load(Ordering::SeqCst), 0);
        kept.expect("the waker was kept").wake();
        assert_eq!(wakes.0.load(Ordering::SeqCst), 1);
    }
}
