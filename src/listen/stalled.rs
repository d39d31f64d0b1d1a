//! The end of an HTTP/2 stream whose peer takes nothing more of it.
//!
//! hyper asks a response's body for more only when the peer has room for it, so the body cannot tell
//! that nobody reads: it is not asked. Whoever runs the stream can.

use std::cell::Cell;
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

tokio::task_local! {
    /// Since when the peer has been able to take what was last made for it.
    static WAITING_FOR_PEER_SINCE: Cell<Option<Instant>>;
}

/// Notes whether the stream's task waits for its peer, or for us. Elsewhere than in a task of
/// [`StreamExecutor`] it does nothing: a socket that nobody reads is seen by its writes.
pub(super) fn set_waiting_for_peer(does: bool) {
    // An error says that this is no such task.
    let _ = WAITING_FOR_PEER_SINCE.try_with(|since| since.set(does.then(Instant::now)));
}

/// Runs the streams of an HTTP/2 connection, and drops each that has waited too long for its peer:
/// that resets the stream, and no other.
#[derive(Clone)]
pub(super) struct StreamExecutor {
    pub(super) tasks: TaskTracker,
    pub(super) write_timeout: Duration,
}

impl<S> Executor<S> for StreamExecutor
where
    S: Future + Send + 'static,
    S::Output: Send,
{
    fn execute(&self, stream: S) {
        self.tasks
            .spawn(run_unless_stalled(stream, self.write_timeout));
    }
}

async fn run_unless_stalled<S: Future>(stream: S, limit: Duration) {
    let ended = async {
        tokio::select! {
            biased;
            _ = stream => {}
            () = stalled(limit) => tracing::debug!("a stream's peer took nothing for too long"),
        }
    };
    WAITING_FOR_PEER_SINCE.scope(Cell::new(None), ended).await;
}

/// Waits until the peer has taken nothing for so long.
async fn stalled(limit: Duration) {
    loop {
        let since = WAITING_FOR_PEER_SINCE
            .with(Cell::get)
            .unwrap_or_else(Instant::now);
        let until = since + limit;
        if until <= Instant::now() {
            return;
        }
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_dropped_after_its_peer_reads_nothing_for_the_timeout() {
        let started = Instant::now();
        let stream = async {
            sleep(Duration::from_secs(5)).await;
            set_waiting_for_peer(true);
            pending::<()>().await;
        };
        run_unless_stalled(stream, LIMIT).await;
        assert_eq!(started.elapsed(), Duration::from_secs(35));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_data_or_with_a_slow_reader_continues() {
        let started = Instant::now();
        let stream = async {
            sleep(Duration::from_secs(600)).await;
            for _ in 0..10 {
                set_waiting_for_peer(true);
                sleep(Duration::from_secs(29)).await;
            }
            set_waiting_for_peer(false);
            sleep(Duration::from_secs(600)).await;
        };
        run_unless_stalled(stream, LIMIT).await;
        assert_eq!(started.elapsed(), Duration::from_secs(600 + 290 + 600));
    }
}
