//! Request bodies: their timeout and minimum rate. The rest of a body that the handler did not read is discarded.
//!
//! A handler may respond, usually with an error, and drop the body before reading all of it. On HTTP/2 that resets
//! the stream. Some clients, such as curl 7.88, treat the reset as a failure of the request and ignore the response.
//! The rest of the body is therefore read and discarded, up to a limit of time and size. On HTTP/1.1, the connection
//! lingers instead.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::activity::Activity;
use super::transport::LINGER_TIMEOUT;
use super::wait_budget::{WaitBudget, WaitLimits};
use crate::error::{Error, ErrorKind};

/// Minimum average rate at which a client must send a body, in bytes per second: the usual setting of Apache's
/// mod_reqtimeout.
pub(super) const MIN_BODY_BYTES_PER_SECOND: u32 = 500;

/// Maximum number of unread body bytes that are read and discarded.
const MAX_DISCARDED_BYTES: usize = 8 * 1024 * 1024;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Body of a request, with a timeout between frames and a minimum rate.
pub struct RequestBody {
    /// `None` after the last frame or an error.
    body: Option<Pin<Box<TimedBody<Incoming>>>>,
    unread: UnreadBody,
}

/// Treatment of a body that the handler did not read to its end.
pub(super) enum UnreadBody {
    /// HTTP/2: a task discards the rest of the body.
    Discard(TaskTracker),
    /// HTTP/1.1: the unread body is reported to the connection, which lingers.
    Report(Arc<Activity>),
}

impl RequestBody {
    pub(super) fn new(body: Incoming, limits: WaitLimits, unread: UnreadBody) -> Self {
        let body = TimedBody::new(body, limits);
        Self {
            body: Some(Box::pin(body)),
            unread,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(body.as_mut().poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            this.body = None;
        }
        if let (Some(Err(_)), UnreadBody::Report(activity)) = (&frame, &this.unread) {
            activity.set_unread_body();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) else {
            return;
        };
        match &self.unread {
            UnreadBody::Discard(tasks) => drop(tasks.spawn(discard(body))),
            UnreadBody::Report(activity) => activity.set_unread_body(),
        }
    }
}

async fn discard(mut body: Pin<Box<TimedBody<Incoming>>>) {
    let read = async {
        let mut left = MAX_DISCARDED_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // The result is ignored: the response has been sent, whatever happens to the rest of the body.
    let _ = timeout(LINGER_TIMEOUT, read).await;
}

pin_project! {
    /// Body that fails with `body_timeout` if its client stops sending, or sends too slowly.
    struct TimedBody<B> {
        #[pin]
        body: B,
        budget: WaitBudget,
        // Set while the body waits for its client.
        #[pin]
        timer: Option<Sleep>,
    }
}

impl<B> TimedBody<B> {
    fn new(body: B, limits: WaitLimits) -> Self {
        Self {
            body,
            budget: WaitBudget::new(limits),
            timer: None,
        }
    }
}

impl<B> Body for TimedBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let Poll::Ready(frame) = this.body.poll_frame(cx) else {
            if this.timer.is_none() {
                this.budget.start_waiting(Instant::now());
                this.timer.set(this.budget.deadline().map(sleep_until));
            }
            if let Some(timer) = this.timer.as_pin_mut() {
                ready!(timer.poll(cx));
            }
            return Poll::Ready(Some(Err(timed_out().into())));
        };
        if this.timer.is_some() {
            this.budget.stop_waiting(Instant::now());
            this.timer.set(None);
        }
        if let Some(Ok(frame)) = &frame {
            this.budget
                .add_bytes(frame.data_ref().map_or(0, Bytes::len));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Returns the error of a body that does not arrive in time. It is a `Status`, because tonic looks for one in the
/// sources of an error.
fn timed_out() -> Status {
    let message = format!(
        "The body did not arrive in time: the client stopped sending, or sent less than {MIN_BODY_BYTES_PER_SECOND} \
         bytes per second."
    );
    Error::new(ErrorKind::BodyTimeout, message).into()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use http_body_util::StreamBody;
    use tokio::time::sleep;
    use tokio_stream::{Stream, StreamExt};

    use super::*;

    const LIMITS: WaitLimits = WaitLimits {
        timeout: Duration::from_secs(30),
        bytes_per_second: Some(MIN_BODY_BYTES_PER_SECOND),
    };

    /// Frames of `bytes` bytes, each after `interval`.
    fn frames(
        count: u32,
        interval: Duration,
        bytes: usize,
    ) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
        tokio_stream::iter(0..count).then(move |_| async move {
            sleep(interval).await;
            Ok(Frame::data(Bytes::from(vec![b' '; bytes])))
        })
    }

    /// Reads a body to its end. Returns its length, or the time at which it failed.
    async fn read(
        frames: impl Stream<Item = Result<Frame<Bytes>, Infallible>>,
    ) -> Result<usize, Duration> {
        let started = Instant::now();
        let body = Box::pin(TimedBody::new(StreamBody::new(frames), LIMITS));
        match body.collect().await {
            Ok(body) => Ok(body.to_bytes().len()),
            Err(error) => {
                let status = error.downcast::<Status>().expect("a status");
                assert_eq!(Error::from(&*status).kind, ErrorKind::BodyTimeout);
                Err(started.elapsed())
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_ended_after_the_body_timeout() {
        let second = Duration::from_secs(1);
        assert_eq!(read(frames(600, 60 * second, 1)).await, Err(30 * second));
        let failed = read(frames(600, second, 1))
            .await
            .expect_err("it is too slow");
        assert_eq!(failed.as_secs(), 30);
        let failed = read(frames(6_000, second, 400)).await;
        let failed = failed.expect_err("it is too slow");
        // After 146 frames, 30 s + 146 * 400 / 500 s - 146 s = 0.8 s are left.
        assert_eq!(failed.as_secs(), 146);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_above_the_minimum_rate_is_read_to_its_end() {
        let slow = frames(1_000, Duration::from_secs(20), 10_000);
        assert_eq!(read(slow).await, Ok(10_000_000));
    }
}
