//! Write timeout of HTTP/2 streams. A stream whose peer has stopped reading is dropped.
//!
//! hyper polls a response body only while the stream has a flow-control window, so the body itself cannot notice that
//! its peer has stalled. The executor that runs the stream's task can.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

tokio::task_local! {
    /// Time since which this stream's data has been waiting for the peer to read. `None` while the stream waits for
    /// the server to produce data.
    static WAITING_FOR_PEER_SINCE: Cell<Option<Instant>>;
}

/// Records whether the current HTTP/2 stream waits for its peer (true) or for the server (false). Does nothing on
/// HTTP/1.1, where the socket's write timeout applies.
pub(super) fn set_waiting_for_peer(is_waiting: bool) {
    // `try_with` fails outside a task of [`StreamExecutor`].
    let _ = WAITING_FOR_PEER_SINCE.try_with(|since| since.set(is_waiting.then(Instant::now)));
}

/// Runs the streams of an HTTP/2 connection. A stream that exceeds the write timeout is dropped, which resets that
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
    WAITING_FOR_PEER_SINCE.scope(Cell::new(None), run)
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
        tracing::debug!("resetting a stream: its peer read nothing within the write timeout");
        Poll::Ready(())
    }
}

/// Completes once the current stream has waited for its peer for `write_timeout`.
async fn wait_until_stalled(write_timeout: Duration) {
    loop {
        let since = WAITING_FOR_PEER_SINCE
            .with(Cell::get)
            .unwrap_or_else(Instant::now);
        let deadline = since + write_timeout;
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
            set_waiting_for_peer(true);
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
                set_waiting_for_peer(true);
                sleep(Duration::from_secs(29)).await;
            }
            set_waiting_for_peer(false);
            sleep(Duration::from_secs(600)).await;
        };
        run_unless_stalled(stream, WRITE_TIMEOUT).await;
        assert_eq!(started.elapsed(), Duration::from_secs(600 + 290 + 600));
    }
}
