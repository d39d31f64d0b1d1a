//! The body of a stream whose headers are sent while the request is still in the queue.
//!
//! Proxies close a connection that receives nothing for about a minute. Sending the headers early ends that wait.
//! On server-sent events, keep-alive comments follow until a worker starts the request. A rejection after the
//! headers is an error record in the stream. This module must not know how tokens are written.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::accept::StreamFormat;
use super::body::StreamOptions;
use super::completions::StartedCompletion;
use super::stream::{KEEP_ALIVE_INTERVAL, StreamAborted, StreamParts, TokenBody};
use crate::error::Error;

/// Completes when a worker has started the request, or the request has failed.
pub(super) type StartFuture =
    Pin<Box<dyn Future<Output = Result<StartedCompletion, Error>> + Send>>;

/// The body of a stream that a worker may not have started yet. Dropping it cancels the request.
pub(super) struct QueuedBody {
    queued: Option<QueuedStream>,
    streaming: Option<TokenBody>,
}

/// A queued request, and what its stream needs once the request starts or fails.
pub(super) struct QueuedStream {
    start: StartFuture,
    stream: (StreamFormat, StreamOptions),
    /// Writes keep-alives, and the error record if the request fails.
    parts: StreamParts,
    /// Timer of the keep-alive comments; `None` for NDJSON, which has no comments.
    keep_alive: Option<Pin<Box<Sleep>>>,
}

impl QueuedBody {
    pub(super) fn new(queued: QueuedStream) -> Self {
        Self {
            queued: Some(queued),
            streaming: None,
        }
    }
}

impl QueuedStream {
    pub(super) fn new(
        start: StartFuture,
        stream: (StreamFormat, StreamOptions),
        parts: StreamParts,
    ) -> Self {
        let has_keep_alive = parts.writer.keep_alive().is_some();
        Self {
            start,
            stream,
            parts,
            keep_alive: has_keep_alive.then(|| Box::pin(sleep(KEEP_ALIVE_INTERVAL))),
        }
    }

    /// The body after the wait, and its first frame if the request failed.
    fn finish(self, started: Result<StartedCompletion, Error>) -> (TokenBody, Option<Bytes>) {
        match started {
            Ok(started) => (started.into_body(self.stream), None),
            Err(error) => {
                let (body, record) = TokenBody::failed(&error, self.parts);
                (body, Some(record))
            }
        }
    }

    /// Returns a keep-alive comment when the interval has passed.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let (Some(timer), Some(comment)) = (&mut self.keep_alive, self.parts.writer.keep_alive())
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
        if let Some(queued) = &mut this.queued {
            let Poll::Ready(started) = queued.start.as_mut().poll(cx) else {
                return queued
                    .poll_keep_alive(cx)
                    .map(|comment| Some(Ok(Frame::data(comment))));
            };
            if let Some(queued) = this.queued.take() {
                let (body, record) = queued.finish(started);
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
