//! Layer that limits the memory of large request bodies.
//!
//! A body that is larger than [`UNCOUNTED_BODY_BYTES`] needs a share of the memory before its remaining bytes are read.
//! The share is as large as the body, or [`MAX_BODY_BYTES`] if the client does not declare a length.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::http::Method;
use axum::http::header::CONTENT_LENGTH;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;

use crate::context::RequestContext;
use crate::request_memory::{MAX_BODY_BYTES, UNCOUNTED_BODY_BYTES};
use crate::telemetry::Api;

/// A body that waits for a share once it exceeds the uncounted size.
struct LimitedBody {
    body: Body,
    context: RequestContext,
    /// Size of the share, in bytes.
    share: u64,
    state: State,
}

enum State {
    /// No share is needed for this number of further bytes.
    Uncounted(u64),
    /// The body waits for its share. The frame that exceeded the uncounted bytes is returned afterwards.
    Waiting(WaitForShare, Option<Bytes>),
    /// The request has its share.
    Counted,
    /// The request got no share.
    Rejected,
}

type WaitForShare = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// Wraps the body of a request, unless the client declares a small length.
pub(super) fn limit_body(context: &RequestContext, request: Request) -> Request {
    let declared = declared_length(&request);
    if declared.is_some_and(|bytes| bytes <= UNCOUNTED_BODY_BYTES) {
        return request;
    }
    // The handler rejects a body that exceeds `MAX_BODY_BYTES`.
    let share = declared.unwrap_or(MAX_BODY_BYTES).min(MAX_BODY_BYTES);
    request.map(|body| {
        Body::new(LimitedBody {
            body,
            context: context.clone(),
            share,
            state: State::Uncounted(UNCOUNTED_BODY_BYTES),
        })
    })
}

/// Returns the size of the body that the client declares. No route reads the body of a GET request.
fn declared_length(request: &Request) -> Option<u64> {
    if request.method() == Method::GET {
        return Some(0);
    }
    let length = request.headers().get(CONTENT_LENGTH)?.to_str().ok()?;
    length.parse().ok()
}

/// Returns the size of a gRPC message with its prefix, from the first bytes of the body. A gRPC client declares it there,
/// and not in `content-length`.
fn message_size(body: &[u8]) -> Option<u64> {
    let (_is_compressed, length) = body.split_first()?;
    let length = u32::from_be_bytes(*length.first_chunk()?);
    Some(u64::from(length).saturating_add(5).min(MAX_BODY_BYTES))
}

impl http_body::Body for LimitedBody {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Uncounted(left) => {
                    let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
                    let Some(Ok(frame)) = frame else {
                        return Poll::Ready(frame.map(|result| result.map_err(Into::into)));
                    };
                    let data = match frame.into_data() {
                        Ok(data) => data,
                        Err(frame) => return Poll::Ready(Some(Ok(frame))),
                    };
                    if *left == UNCOUNTED_BODY_BYTES && this.context.api() == Api::Grpc {
                        this.share = message_size(&data).unwrap_or(this.share);
                    }
                    let size = u64::try_from(data.len()).unwrap_or(u64::MAX);
                    if let Some(rest) = left.checked_sub(size) {
                        *left = rest;
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                    let (context, share) = (this.context.clone(), this.share);
                    let waiting = async move {
                        let shares = context.memory_shares();
                        shares.wait_for_body(share).await.map_err(Status::from)
                    };
                    this.state = State::Waiting(Box::pin(waiting), Some(data));
                }
                State::Waiting(waiting, data) => {
                    if let Err(status) = ready!(waiting.as_mut().poll(cx)) {
                        this.state = State::Rejected;
                        return Poll::Ready(Some(Err(status.into())));
                    }
                    let data = data.take();
                    this.state = State::Counted;
                    return Poll::Ready(data.map(|data| Ok(Frame::data(data))));
                }
                State::Rejected => return Poll::Ready(None),
                State::Counted => {
                    let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
                    return Poll::Ready(frame.map(|result| result.map_err(Into::into)));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Waiting(..) => false,
            State::Rejected => true,
            State::Uncounted(_) | State::Counted => self.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            // The stashed frame has left `body`.
            State::Waiting(..) | State::Rejected => SizeHint::default(),
            State::Uncounted(_) | State::Counted => self.body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Version;
    use futures_util::FutureExt;
    use http_body_util::{BodyExt, Full};
    use tokio_stream::StreamExt;

    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::request_memory::RequestMemory;

    const LARGEST: usize = 4 * 1024 * 1024;

    /// Reads a body whose size the client declares.
    async fn read(context: &RequestContext, bytes: usize) -> Result<usize, Error> {
        let mut request = Request::new(Body::new(Full::new(Bytes::from(vec![0; bytes]))));
        *request.method_mut() = Method::POST;
        let headers = request.headers_mut();
        headers.insert(CONTENT_LENGTH, bytes.into());
        read_request(context, request).await
    }

    /// Reads a body in chunks of 1,000 bytes. The client does not declare its size.
    async fn read_chunks(context: &RequestContext, chunks: u8) -> Result<usize, Error> {
        let chunks = tokio_stream::iter(0..chunks);
        let chunks = chunks.map(|chunk| Ok::<_, Status>(Bytes::from(vec![chunk; 1_000])));
        let mut request = Request::new(Body::from_stream(chunks));
        *request.method_mut() = Method::POST;
        read_request(context, request).await
    }

    async fn read_request(context: &RequestContext, request: Request) -> Result<usize, Error> {
        let request = limit_body(context, request);
        match request.into_body().collect().await {
            Ok(body) => {
                let bytes = body.to_bytes();
                assert!(bytes.is_sorted(), "the chunks are in order");
                Ok(bytes.len())
            }
            Err(error) => {
                let status = Status::from_error(error.into_inner());
                Err(Error::from(&status))
            }
        }
    }

    fn context(memory: &RequestMemory) -> RequestContext {
        RequestContext::with_memory(Api::Http, Version::HTTP_11, memory)
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_body_waits_until_another_large_request_has_started() {
        let memory = RequestMemory::new(0);
        let (first, second) = (context(&memory), context(&memory));
        assert_eq!(read(&first, LARGEST).await, Ok(LARGEST));
        let mut waiting = Box::pin(read(&second, LARGEST));
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(read(&context(&memory), 64 * 1024).await, Ok(64 * 1024));
        assert_eq!(read_chunks(&context(&memory), 65).await, Ok(65_000));
        first.record_start(1);
        assert_eq!(waiting.await, Ok(LARGEST));
        drop(second);
        assert_eq!(read_chunks(&context(&memory), 200).await, Ok(200_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_body_that_waits_too_long_is_rejected() {
        let memory = RequestMemory::new(0);
        let held = context(&memory);
        assert_eq!(read_chunks(&held, 200).await, Ok(200_000));
        for rejected in [
            read(&context(&memory), 64 * 1024 + 1).await,
            read_chunks(&context(&memory), 200).await,
        ] {
            let error = rejected.expect_err("the memory is used up");
            assert_eq!(error.kind, ErrorKind::QueueFull);
            assert!(error.retry_after.is_some());
        }
    }
}
