//! Write timeout and minimum reading rate of HTTP/2 streams. A stream whose peer reads nothing, or too slowly, is
//! dropped.
//!
//! hyper polls a response body only while the stream can send, so the body itself cannot notice that its peer has
//! stalled. The executor that runs the stream's task can.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

use super::wait_budget::{WaitBudget, WaitLimits};

/// Minimum average rate at which a peer must read a stream that has data for it, in bytes per second.
const MIN_READ_BYTES_PER_SECOND: u32 = 100;

tokio::task_local! {
    /// Time for which this stream's data has waited for the peer to read.
    static WAITS_FOR_PEER: Cell<WaitBudget>;
}

/// Records that the current HTTP/2 stream waits for its peer to read, after this number of further bytes. Does nothing
/// on HTTP/1.1, where the socket's write timeout applies.
pub(super) fn start_waiting_for_peer(bytes: usize) {
    update_waits(|waits| {
        waits.add_bytes(bytes);
        waits.start_waiting(Instant::now());
    });
}

/// Records that the current HTTP/2 stream waits for the server to produce data.
pub(super) fn stop_waiting_for_peer() {
    update_waits(|waits| waits.stop_waiting(Instant::now()));
}

fn update_waits(update: impl FnOnce(&mut WaitBudget)) {
    // `try_with` fails outside a task of [`StreamExecutor`].
    let _ = WAITS_FOR_PEER.try_with(|cell| {
        let mut waits = cell.get();
        update(&mut waits);
        cell.set(waits);
    });
}

/// Runs the streams of an HTTP/2 connection. A stream whose peer does not read in time is dropped, which resets that
/// stream only.
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

/// Runs a stream until it ends or has stalled. This is not an `async fn`, because that would keep the stream twice, in
/// every stream's task.
fn run_unless_stalled<S: Future>(stream: S, write_timeout: Duration) -> impl Future<Output = ()> {
    let run = UnlessStalled {
        stream,
        stalled: wait_until_stalled(write_timeout),
    };
    let limits = WaitLimits {
        timeout: write_timeout,
        bytes_per_second: Some(MIN_READ_BYTES_PER_SECOND),
    };
    WAITS_FOR_PEER.scope(Cell::new(WaitBudget::new(limits)), run)
}

pin_project! {
    /// A stream that is dropped when `stalled` completes.
    struct UnlessStalled<S, T> {
        #[pin]
        stream: S,
        #[pin]
        stalled: T,
    }
}

impl<S: Future, T: Future<Output = ()>> Future for UnlessStalled<S, T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.stream.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        ready!(this.stalled.poll(cx));
        tracing::debug!(
            "resetting a stream: its peer did not read within the write timeout, or read too slowly"
        );
        Poll::Ready(())
    }
}

/// Completes once the current stream has waited too long for its peer. If the stream has produced data meanwhile, it
/// may complete late, by up to the write timeout.
async fn wait_until_stalled(write_timeout: Duration) {
    loop {
        let deadline = WAITS_FOR_PEER.with(Cell::get).deadline();
        let deadline = deadline.unwrap_or_else(|| Instant::now() + write_timeout);
        if deadline <= Instant::now() {
            return;
        }
        sleep_until(deadline).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::sleep;

    use super::*;

    const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_dropped_after_its_peer_reads_nothing_for_the_timeout() {
        let started = Instant::now();
        let stream = async {
            sleep(Duration::from_secs(5)).await;
            start_waiting_for_peer(0);
            pending::<()>().await;
        };
        run_unless_stalled(stream, WRITE_TIMEOUT).await;
        assert_eq!(started.elapsed(), Duration::from_secs(35));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_data_or_with_a_slow_reader_continues() {
        let started = Instant::now();
        let stream = async {
            sleep(Duration::from_secs(600)).await;
            for _ in 0..10 {
                start_waiting_for_peer(2_900);
                sleep(Duration::from_secs(29)).await;
                stop_waiting_for_peer();
            }
            sleep(Duration::from_secs(600)).await;
        };
        run_unless_stalled(stream, WRITE_TIMEOUT).await;
        assert_eq!(started.elapsed(), Duration::from_secs(600 + 290 + 600));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_peer_reads_below_the_minimum_rate_is_dropped() {
        let started = Instant::now();
        let stream = async {
            loop {
                start_waiting_for_peer(10);
                sleep(Duration::from_secs(1)).await;
                stop_waiting_for_peer();
            }
        };
        run_unless_stalled(stream, WRITE_TIMEOUT).await;
        let elapsed = started.elapsed().as_secs();
        assert!((30..=60).contains(&elapsed), "{elapsed} s");
    }
}
