//! The body of a stream whose headers were sent while the request still waited in the queue.
//!
//! Proxies close a connection on which nothing comes back for a minute or so. The headers end their wait, and on
//! server-sent events comments follow until a worker has begun. A refusal then is a record in the stream. This
//! module must not know how tokens are written.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::accept::StreamFormat;
use super::body::StreamOptions;
use super::completions::StartedCompletion;
use super::stream::{DeliveryTracker, KEEP_ALIVE_INTERVAL, StreamAborted, StreamParts, TokenBody};
use crate::error::Error;
use crate::telemetry::CountedRequest;

/// A request that waits for a worker.
pub(super) type StartFuture =
    Pin<Box<dyn Future<Output = Result<StartedCompletion, Error>> + Send>>;

/// The body of a stream that may not have begun. Dropping it cancels the request.
pub(super) struct QueuedBody {
    waiting: Option<(QueuedStream, DeliveryTracker, CountedRequest)>,
    streaming: Option<TokenBody>,
}

/// A request that waits, and how what comes of it is told.
pub(super) struct QueuedStream {
    beginning: StartFuture,
    stream: (StreamFormat, StreamOptions),
    /// How a refusal is told.
    told: StreamParts,
    keep_alive: Option<Pin<Box<Sleep>>>,
}

impl QueuedBody {
    pub(super) fn new(
        waiting: QueuedStream,
        leaving: DeliveryTracker,
        counted: CountedRequest,
    ) -> Self {
        Self {
            waiting: Some((waiting, leaving, counted)),
            streaming: None,
        }
    }
}

impl QueuedStream {
    /// A wait for `beginning` in a stream of this form. `told` says how a refusal is written.
    pub(super) fn new(
        beginning: StartFuture,
        stream: (StreamFormat, StreamOptions),
        told: StreamParts,
    ) -> Self {
        let keep_alive = told
            .lines
            .keep_alive()
            .map(|_| Box::pin(sleep(KEEP_ALIVE_INTERVAL)));
        Self {
            beginning,
            stream,
            told,
            keep_alive,
        }
    }

    /// The body once the wait is over, and its first frame where that is a refusal.
    fn ended(
        self,
        begun: Result<StartedCompletion, Error>,
        leaving: DeliveryTracker,
        counted: CountedRequest,
    ) -> (TokenBody, Option<Bytes>) {
        match begun {
            Ok(begun) => (begun.into_body(self.stream, leaving, counted), None),
            Err(error) => {
                let (body, record) = TokenBody::failed(&error, self.told, leaving, counted);
                (body, Some(record))
            }
        }
    }

    /// A comment when the stream has been silent for long.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let (Some(timer), Some(comment)) = (&mut self.keep_alive, self.told.lines.keep_alive())
        else {
            return Poll::Pending;
        };
        ready!(timer.as_mut().poll(cx));
        timer.as_mut().reset(Instant::now() + KEEP_ALIVE_INTERVAL);
        Poll::Ready(comment)
    }
}

impl http_body::Body for QueuedBody {
    type Data = Bytes;
    type Error = StreamAborted;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamAborted>>> {
        let this = self.get_mut();
        if let Some((waiting, ..)) = &mut this.waiting {
            let Poll::Ready(begun) = waiting.beginning.as_mut().poll(cx) else {
                return waiting
                    .poll_keep_alive(cx)
                    .map(|comment| Some(Ok(Frame::data(comment))));
            };
            if let Some((waiting, leaving, counted)) = this.waiting.take() {
                let (body, record) = waiting.ended(begun, leaving, counted);
                this.streaming = Some(body);
                if let Some(record) = record {
                    return Poll::Ready(Some(Ok(Frame::data(record))));
                }
            }
        }
        match &mut this.streaming {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }
}
