//! The response body of a streamed completion.
//!
//! Tokens that are ready together share a frame. A single token is sent at once, without polling for another.
//! An error after the first byte becomes an error record. After the record has been flushed to the socket, the
//! body ends with an error, so that a client that ignores the record still sees a broken stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, VARY};
use axum::http::{HeaderValue, Response};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::sleep;

use super::accept::StreamFormat;
use super::completion_stream::{CompletionStream, MergedEvent, finish_reason};
use super::dialect::{ChoiceTokens, RecordWriter, StreamEnd};
use super::echoed_prompts::EchoedPrompts;
use super::field_names::FieldNames;
use super::keep_alive::KeepAlive;
use crate::context::RequestContext;
use crate::delivery::{DeliveryTimer, WriteStart};
use crate::error::Error;
use crate::proto::v1;

/// Frame size in bytes at which no more records are added. The last event may exceed it.
const TARGET_FRAME_BYTES: usize = 64 * 1024;

/// Maximum time for flushing the error record of a failed stream to the socket.
const ERROR_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Delay between the error record and the reset of an HTTP/2 stream. Some clients, such as curl, discard the unread
/// data of a stream that is reset.
const HTTP2_RESET_DELAY: Duration = Duration::from_millis(100);

/// The body of a streamed completion.
pub(super) struct StreamBody<W> {
    /// The events of the completion. `None` once the stream has ended or failed.
    stream: Option<CompletionStream>,
    writer: W,
    /// The prompts to repeat, if the request sets `echo`.
    echo: Option<EchoedPrompts>,
    names: FieldNames,
    /// Records of the next frame. Its memory is reused after the frame has been written to the socket.
    buffer: BytesMut,
    context: RequestContext,
    timer: DeliveryTimer,
    /// True if the last poll found nothing to write.
    was_idle: bool,
    tokens_delivered: u64,
    /// True if the engine reports only text. A part of a chat message then counts as one token.
    is_text_only: bool,
    state: StreamState,
}

/// The parts with which a [`StreamBody`] writes its events.
pub(super) struct StreamParts<W> {
    pub(super) writer: W,
    /// The prompts to repeat, if the request sets `echo`.
    pub(super) echo: Option<EchoedPrompts>,
    /// Translates the engine's field names in errors to the names that the client used.
    pub(super) names: FieldNames,
    pub(super) context: RequestContext,
}

/// State of a stream that is ending.
enum StreamState {
    Open,
    /// The stream has succeeded, and its last records are written.
    Finished,
    /// The stream has failed. The body has returned the error record except for this last byte.
    LastByte(Bytes),
    /// The body has returned the whole error record. The future completes once the record is flushed.
    Flushing(Pin<Box<dyn Future<Output = ()> + Send>>),
    /// The body has returned its error, so hyper aborts the response.
    Aborted,
}

/// Error that ends a body after its error record. hyper then closes the connection or resets the HTTP/2 stream.
#[derive(Debug, thiserror::Error)]
#[error("the completion failed; its last record says why")]
pub(super) struct StreamAborted;

/// Builds the response with a streamed body: adds the headers of a stream and keep-alive records.
pub(super) fn response<B>(
    body: B,
    keep_alive: Option<Bytes>,
    format: StreamFormat,
) -> Response<Body>
where
    B: http_body::Body<Data = Bytes, Error = StreamAborted> + Send + Unpin + 'static,
{
    let content_type = match format {
        StreamFormat::Ndjson => "application/x-ndjson",
        StreamFormat::Sse => "text/event-stream; charset=utf-8",
    };
    let mut response = Response::new(Body::new(KeepAlive::new(body, keep_alive)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(
        CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-transform"),
    );
    headers.insert(VARY, HeaderValue::from_static("accept"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<W: RecordWriter> StreamBody<W> {
    /// Creates the body of a request that a worker has started.
    pub(super) fn new(stream: CompletionStream, mut parts: StreamParts<W>) -> Self {
        let mut buffer = BytesMut::new();
        parts
            .writer
            .write_start(&mut buffer, stream.first_started());
        Self::build(Some(stream), parts, buffer)
    }

    /// Creates the body of a request that failed before it started. Also returns the first frame: the error record
    /// without its last byte, which the body sends.
    pub(super) fn failed(error: &Error, parts: StreamParts<W>) -> (Self, Bytes) {
        let mut body = Self::build(None, parts, BytesMut::new());
        body.fail(error);
        let record = body.buffer.split().freeze();
        (body, record)
    }

    fn build(stream: Option<CompletionStream>, parts: StreamParts<W>, buffer: BytesMut) -> Self {
        let started = stream.as_ref().map(CompletionStream::first_started);
        let is_text_only = started.is_some_and(|started| started.text_only);
        let flush = parts.context.flush_handle().clone();
        let timer = DeliveryTimer::new(parts.context.record(), flush);
        Self {
            stream,
            writer: parts.writer,
            echo: parts.echo,
            names: parts.names,
            buffer,
            context: parts.context,
            timer,
            was_idle: false,
            tokens_delivered: 0,
            is_text_only,
            state: StreamState::Open,
        }
    }

    /// Returns the record that keeps the connection open while the stream is idle, or `None` if the format has no
    /// such record.
    pub(super) fn keep_alive(&self) -> Option<Bytes> {
        self.writer.keep_alive()
    }

    /// Writes the records of all events that are ready. Pending if there are none.
    fn poll_records(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let start = WriteStart::now();
        // hyper polls once more before it flushes. Tokens that this second poll finds are batched. Only a token that
        // hyper was waiting for is sent alone.
        let was_idle = std::mem::take(&mut self.was_idle);
        let mut is_single = false;
        while self.buffer.len() < TARGET_FRAME_BYTES && !is_single {
            let Some(stream) = &mut self.stream else {
                break;
            };
            match stream.poll_next(cx) {
                Poll::Pending if self.buffer.is_empty() => {
                    self.was_idle = true;
                    return Poll::Pending;
                }
                Poll::Pending => break,
                Poll::Ready(Ok(MergedEvent::Started(started))) => {
                    self.context.record_start(started.prompt_tokens);
                    self.writer.write_start(&mut self.buffer, &started);
                }
                Poll::Ready(Ok(MergedEvent::Prompt(prompt, part))) => {
                    let added = self.echo.as_mut().map(|echo| echo.add(prompt, part));
                    if let Some(Err(error)) = added {
                        self.fail(&error);
                    }
                }
                Poll::Ready(Ok(MergedEvent::Tokens(tokens))) => {
                    is_single = was_idle && tokens.tokens.len() == 1 && stream.choices() == 1;
                    self.write(&tokens, start);
                }
                Poll::Ready(Ok(MergedEvent::Chat(delta))) => {
                    is_single = was_idle && stream.choices() == 1;
                    self.write_chat_delta(&delta, start);
                }
                Poll::Ready(Ok(MergedEvent::Ended(usage, timings))) => self.end(usage, timings),
                Poll::Ready(Err(error)) => self.fail(&error),
            }
        }
        Poll::Ready(self.buffer.split().freeze())
    }

    fn write(&mut self, tokens: &v1::Tokens, start: WriteStart) {
        let choice = ChoiceTokens {
            index: tokens.choice,
            tokens: &tokens.tokens,
            finish_reason: finish_reason(tokens),
        };
        let echo = self.echo.as_mut();
        if let Some(prompt) = echo.and_then(|echo| echo.start_choice(choice.index)) {
            self.writer
                .write_prompt(&mut self.buffer, choice.index, &prompt);
        }
        self.writer.write_tokens(&mut self.buffer, &choice);
        let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
        self.tokens_delivered += count;
        self.timer.record_written(start, tokens.choice, count);
    }

    fn write_chat_delta(&mut self, delta: &v1::ChatDelta, start: WriteStart) {
        self.writer.write_chat_delta(&mut self.buffer, delta);
        let count = u64::from(self.is_text_only);
        self.tokens_delivered += count;
        self.timer.record_written(start, delta.choice, count);
    }

    fn end(&mut self, usage: v1::Usage, timings: v1::Timings) {
        let delivery = self.timer.summary();
        let end = StreamEnd {
            usage,
            timings,
            delivery,
        };
        self.writer.write_end(&mut self.buffer, &end);
        self.context
            .set_usage(usage.prompt_tokens, usage.completion_tokens);
        self.timer.record_end(Ok(()));
        self.stream = None;
        self.state = StreamState::Finished;
    }

    fn fail(&mut self, error: &Error) {
        let buffer = &mut self.buffer;
        let client_error = self.names.with_client_field_name(error.clone());
        self.writer
            .write_error(buffer, &client_error, self.tokens_delivered);
        self.timer.record_end(Err(error.kind));
        self.stream = None;
        // On HTTP/2, hyper polls for the next frame as soon as the peer's window has room for one byte of this frame.
        // If the last frame has only one byte, that poll means that the whole record has been sent.
        let last = buffer.split_off(buffer.len() - 1);
        self.state = StreamState::LastByte(last.freeze());
    }

    /// Waits until the error record has been flushed to the socket.
    fn wait_for_flush(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let flush = self.context.flush_handle().clone();
        Box::pin(async move {
            // This future is first polled after hyper has taken the last byte, so the wait includes that byte.
            flush.wait_until_flushed(ERROR_FLUSH_TIMEOUT).await;
            if flush.is_http2() {
                sleep(HTTP2_RESET_DELAY).await;
            }
        })
    }
}

impl<W: RecordWriter> http_body::Body for StreamBody<W> {
    type Data = Bytes;
    type Error = StreamAborted;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamAborted>>> {
        let this = self.get_mut();
        match &mut this.state {
            StreamState::Open => {}
            StreamState::Finished => return Poll::Ready(None),
            StreamState::LastByte(last) => {
                let last = std::mem::take(last);
                this.state = StreamState::Flushing(this.wait_for_flush());
                return Poll::Ready(Some(Ok(Frame::data(last))));
            }
            StreamState::Flushing(flushed) => {
                ready!(flushed.as_mut().poll(cx));
                this.state = StreamState::Aborted;
                return Poll::Ready(Some(Err(StreamAborted)));
            }
            StreamState::Aborted => return Poll::Ready(None),
        }
        let records = ready!(this.poll_records(cx));
        Poll::Ready(Some(Ok(Frame::data(records))))
    }
}
