//! Request bodies. The rest of a body that the handler did not read is discarded.
//!
//! A handler may respond, usually with an error, and drop the body before reading all of it. On HTTP/2 that resets
//! the stream. Some clients, such as curl 7.88, treat the reset as a failure of the request and ignore the response.
//! The rest of the body is therefore read and discarded, up to a limit of time and size. On HTTP/1.1, the connection
//! lingers instead.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tower_http::timeout::TimeoutBody;

use super::transport::LINGER_TIMEOUT;

/// Maximum number of unread body bytes that are read and discarded.
const MAX_DISCARDED_BYTES: usize = 8 * 1024 * 1024;

type TimedBody = Pin<Box<TimeoutBody<Incoming>>>;

/// Body of a request, with a timeout between frames.
pub struct RequestBody {
    /// `None` after the last frame or an error.
    body: Option<TimedBody>,
    /// Runs the task that discards the rest of the body; `None` on HTTP/1.1.
    discard_tasks: Option<TaskTracker>,
}

impl RequestBody {
    pub(super) fn new(body: TimeoutBody<Incoming>, discard_tasks: Option<TaskTracker>) -> Self {
        let body = Some(Box::pin(body));
        Self {
            body,
            discard_tasks,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(body.as_mut().poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            this.body = None;
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
        if let (Some(body), Some(tasks)) = (self.body.take(), self.discard_tasks.take())
            && !body.is_end_stream()
        {
            tasks.spawn(discard(body));
        }
    }
}

async fn discard(mut body: TimedBody) {
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
