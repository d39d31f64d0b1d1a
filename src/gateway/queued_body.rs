//! The body of a stream whose headers are sent while the request is still in the queue.
//!
//! Proxies close a connection that receives nothing for about a minute. Early headers end the proxy's wait, and
//! keep-alive records follow. A rejection after the headers is an error record in the stream. This module must not
//! know how tokens are written.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;

use super::dialect::RecordWriter;
use super::stream_body::{StreamAborted, StreamBody, StreamParts};
use crate::error::Error;

/// Completes when a worker has started the request or the request has failed.
pub(super) type StartFuture<W> = Pin<Box<dyn Future<Output = Result<StreamBody<W>, Error>> + Send>>;

/// The body of a stream that a worker may not have started yet. Dropping it cancels the request.
pub(super) struct QueuedBody<W> {
    queued: Option<QueuedStream<W>>,
    streaming: Option<StreamBody<W>>,
}

/// A queued request.
struct QueuedStream<W> {
    start: StartFuture<W>,
    /// Parts to write the error record with, if the request fails.
    parts: StreamParts<W>,
}

impl<W> QueuedBody<W> {
    /// Creates a body that waits for `start`. It uses `parts` only if the request fails before it starts.
    pub(super) fn new(start: StartFuture<W>, parts: StreamParts<W>) -> Self {
        Self {
            queued: Some(QueuedStream { start, parts }),
            streaming: None,
        }
    }
}

impl<W: RecordWriter> http_body::Body for QueuedBody<W> {
    type Data = Bytes;
    type Error = StreamAborted;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamAborted>>> {
        let this = self.get_mut();
        if let Some(queued) = &mut this.queued {
            let started = ready!(queued.start.as_mut().poll(cx));
            if let Some(queued) = this.queued.take() {
                match started {
                    Ok(body) => this.streaming = Some(body),
                    Err(error) => {
                        let (body, record) = StreamBody::failed(&error, queued.parts);
                        this.streaming = Some(body);
                        return Poll::Ready(Some(Ok(Frame::data(record))));
                    }
                }
            }
        }
        match &mut this.streaming {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }
}
