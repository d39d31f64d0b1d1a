//! A request's body on its way in, and what becomes of the part that nobody reads.
//!
//! An answer may be there before its request's body is: a refusal, for one. Whoever answers then drops
//! the body, and HTTP/2 resets its stream for that. Some clients, curl 7.88 among them, take the reset
//! for a failure of the whole exchange and never look at the answer, so the rest is read and dropped for
//! a moment. On HTTP/1.1 the connection lingers instead.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tower_http::timeout::TimeoutBody;

use super::io::LINGER_TIMEOUT;

/// How much of a body is read that nobody wants.
const MAX_DISCARDED_BYTES: usize = 8 * 1024 * 1024;

type Inner = Pin<Box<TimeoutBody<Incoming>>>;

/// What a request's body is: its frames must keep coming.
pub struct RequestBody {
    /// Gone when all has been read.
    body: Option<Inner>,
    /// Where the rest is read that nobody wants, on HTTP/2.
    rest: Option<TaskTracker>,
}

impl RequestBody {
    pub(super) fn new(body: TimeoutBody<Incoming>, rest: Option<TaskTracker>) -> Self {
        let body = Some(Box::pin(body));
        Self { body, rest }
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
        if let (Some(body), Some(tasks)) = (self.body.take(), self.rest.take())
            && !body.is_end_stream()
        {
            tasks.spawn(discard(body));
        }
    }
}

async fn discard(mut body: Inner) {
    let read = async {
        let mut left = MAX_DISCARDED_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(length) else {
                return;
            };
            left = rest;
        }
    };
    // However it ends, nobody is left to tell.
    let _ = timeout(LINGER_TIMEOUT, read).await;
}
