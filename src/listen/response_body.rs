//! Response bodies: they keep their request marked as in progress, and report to the HTTP/2 stream's write timeout.
//!
//! hyper asks for a frame, waits until the stream has sent all earlier frames and has a flow-control window, and hands
//! the frame to h2. A request is over for hyper once h2 has the last frame, even if the peer takes nothing of it. The
//! write timeout could then not end the stream, and h2 would keep the frame as long as the connection lives. On HTTP/2,
//! large frames are therefore divided: into pieces, so that a slow peer makes progress with each piece; and the last
//! byte of the body is a piece of its own, so that hyper waits until the others are sent.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Version;
use http_body::{Body, Frame, SizeHint};

use super::activity::ActiveRequest;
use super::stalled;

/// Maximum size of a piece, in bytes: the default size of a DATA frame.
const PIECE_BYTES: usize = 16 * 1024;

/// Size up to which a frame is never divided, in bytes. An unread last frame of this size costs little memory, and
/// frames with one or a few tokens need no further poll.
const UNDIVIDED_BYTES: usize = 1_024;

pin_project_lite::pin_project! {
    /// Body of a response.
    pub(super) struct TrackedBody<B> {
        #[pin]
        body: B,
        request: ActiveRequest,
        is_http2: bool,
        // Pieces of the body's latest data that hyper does not have yet.
        rest: Bytes,
        // Next frame of the body after `rest`, if the body was polled ahead. Boxed, because most streams never need it.
        next: Option<Box<NextFrame>>,
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type NextFrame = Option<Result<Frame<Bytes>, BoxError>>;

impl<B> TrackedBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    pub(super) fn new(body: B, request: ActiveRequest, version: Version) -> Self {
        stalled::start_waiting_for_peer(0);
        Self {
            body,
            request,
            is_http2: version == Version::HTTP_2,
            rest: Bytes::new(),
            next: None,
        }
    }

    /// Returns the next frame of the body, or the next piece of a divided frame.
    fn poll_piece(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<NextFrame> {
        let mut this = self.project();
        let mut data = std::mem::take(this.rest);
        if data.is_empty() {
            let frame = match this.next.take() {
                Some(frame) => *frame,
                None => boxed_error(ready!(this.body.as_mut().poll_frame(cx))),
            };
            data = match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => data,
                Some(Ok(Err(other))) => return Poll::Ready(Some(Ok(other))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            };
            if !*this.is_http2 || data.len() <= UNDIVIDED_BYTES {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
        if data.len() > PIECE_BYTES {
            *this.rest = data.split_off(PIECE_BYTES);
        } else if data.len() > 1 {
            if this.next.is_none()
                && let Poll::Ready(frame) = this.body.poll_frame(cx)
            {
                *this.next = Some(Box::new(boxed_error(frame)));
            }
            let is_last = |next: &NextFrame| !matches!(next, Some(Ok(frame)) if frame.is_data());
            if this.next.as_deref().is_some_and(is_last) {
                *this.rest = data.split_off(data.len() - 1);
            }
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}

fn boxed_error<E: Into<BoxError>>(frame: Option<Result<Frame<Bytes>, E>>) -> NextFrame {
    frame.map(|frame| frame.map_err(Into::into))
}

impl<B> Body for TrackedBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<NextFrame> {
        stalled::stop_waiting_for_peer();
        let frame = ready!(self.as_mut().poll_piece(cx));
        let data = frame
            .as_ref()
            .and_then(|frame| frame.as_ref().ok()?.data_ref());
        stalled::start_waiting_for_peer(data.map_or(0, Bytes::len));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.next {
            _ if !self.rest.is_empty() => false,
            None => self.body.is_end_stream(),
            Some(next) => next.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_empty() && self.next.is_none() {
            self.body.size_hint()
        } else {
            SizeHint::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use http::HeaderMap;
    use http_body_util::{BodyExt, Full, StreamBody};

    use super::super::activity::Activity;
    use super::*;

    /// Reads a body to its end. Returns the size of each data frame.
    async fn sizes<B>(body: B, version: Version) -> Vec<usize>
    where
        B: Body<Data = Bytes, Error = Infallible> + Unpin,
    {
        let request = Arc::new(Activity::new()).start_request(version);
        let mut body = TrackedBody::new(body, request, version);
        let mut sizes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.expect("a frame");
            match frame.into_data() {
                Ok(data) => sizes.push(data.len()),
                Err(trailers) => assert!(trailers.is_trailers()),
            }
        }
        sizes
    }

    fn full(size: usize) -> Full<Bytes> {
        Full::new(Bytes::from(vec![b' '; size]))
    }

    #[tokio::test]
    async fn a_large_body_is_sent_in_pieces_with_its_last_byte_apart() {
        let divided = sizes(full(40_000), Version::HTTP_2).await;
        assert_eq!(divided, [16_384, 16_384, 7_231, 1]);
        assert_eq!(sizes(full(1_025), Version::HTTP_2).await, [1_024, 1]);
        assert_eq!(sizes(full(1_024), Version::HTTP_2).await, [1_024]);
        assert_eq!(sizes(full(40_000), Version::HTTP_11).await, [40_000]);
    }

    #[tokio::test]
    async fn only_the_last_data_before_trailers_is_divided() {
        let data = |size| Frame::data(Bytes::from(vec![b' '; size]));
        let trailers = Frame::trailers(HeaderMap::new());
        let frames = [data(2_000), data(1), data(3_000), trailers].map(Ok);
        let body = StreamBody::new(tokio_stream::iter(frames));
        let divided = sizes(body, Version::HTTP_2).await;
        assert_eq!(divided, [2_000, 1, 2_999, 1]);
    }
}
