//! Keep-alive records on an idle stream.
//!
//! Proxies close a connection that receives nothing for about a minute. This module must not know what a stream
//! sends.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep};

/// Time without data after which a keep-alive record is sent.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// A body that sends a keep-alive record when the inner body has sent nothing for an interval.
pub(super) struct KeepAlive<B> {
    body: B,
    /// Timer for the keep-alive record. `None` for a format without such records, such as NDJSON.
    idle: Option<IdleTimer>,
}

/// Measures the time since the last frame.
struct IdleTimer {
    timer: Pin<Box<Sleep>>,
    record: Bytes,
}

impl<B> KeepAlive<B> {
    /// Wraps a body. `record` is the keep-alive record, or `None` for a format without such records.
    pub(super) fn new(body: B, record: Option<Bytes>) -> Self {
        let idle = record.map(|record| IdleTimer {
            timer: Box::pin(sleep(KEEP_ALIVE_INTERVAL)),
            record,
        });
        Self { body, idle }
    }
}

impl IdleTimer {
    fn reset(&mut self) {
        let timer = self.timer.as_mut();
        timer.reset(Instant::now() + KEEP_ALIVE_INTERVAL);
    }

    /// Returns the keep-alive record once the interval has passed.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        ready!(self.timer.as_mut().poll(cx));
        self.reset();
        Poll::Ready(self.record.clone())
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for KeepAlive<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        match (&mut this.idle, frame) {
            (Some(idle), Poll::Pending) => {
                idle.poll(cx).map(|record| Some(Ok(Frame::data(record))))
            }
            (Some(idle), Poll::Ready(frame)) => {
                idle.reset();
                Poll::Ready(frame)
            }
            (None, frame) => frame,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::{StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use tokio::time::sleep;

    use super::*;

    /// Returns the frames of a body that sends one frame after each of these delays, in seconds.
    async fn frames(delays: [u64; 4]) -> Vec<Bytes> {
        let body = stream::iter(delays).then(async |seconds| {
            sleep(Duration::from_secs(seconds)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"data")))
        });
        let body = StreamBody::new(Box::pin(body));
        let mut body = KeepAlive::new(body, Some(Bytes::from_static(b"alive")));
        let mut frames = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.unwrap_or_else(|never| match never {});
            frames.extend(frame.into_data());
        }
        frames
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_sent_only_after_an_interval_without_data() {
        let busy = frames([10, 10, 10, 10]).await;
        assert_eq!(busy, ["data"; 4]);
        let idle = frames([10, 20, 10, 10]).await;
        assert_eq!(idle, ["data", "alive", "data", "data", "data"]);
    }
}
