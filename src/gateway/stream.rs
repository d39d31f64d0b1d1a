//! A streamed completion: the response's body, as it is made.
//!
//! Tokens that are ready together share a frame; a lone token never waits, not even for a look at whether
//! there is another. An error after the first
//! byte is told by a record of its own, and once that has left for the socket the body ends with an
//! error, so that a client which ignores the record still sees a broken stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, VARY};
use axum::http::{HeaderValue, Response};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::accept::StreamFormat;
use super::answer::finish_reason;
use super::completion_stream::{CompletionStream, MergedEvent};
use super::echo::Echo;
use super::error_response::FieldNames;
use super::lines::{ChoiceTokens, LineWriter};
use super::timings;
use crate::delivery::{DeliveryTimer, FlushHandle, WriteStart};
use crate::error::Error;
use crate::proto::v1;
use crate::telemetry::CountedRequest;

/// A frame is ended once it is so large: what is more waits for the next.
const MAX_FRAME_BYTES: usize = 64 * 1024;

/// How often a silent stream of server-sent events says that it is alive.
pub(super) const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// How long the last record of a failed stream may take to leave.
const ERROR_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a peer on HTTP/2 has to read that record before its stream is reset: some clients, curl among
/// them, throw away what they have not read of a stream that was reset.
const HTTP2_RESET_DELAY: Duration = Duration::from_millis(100);

/// The body of a streamed completion.
pub(super) struct TokenBody {
    completion_stream: Option<CompletionStream>,
    lines: LineWriter,
    /// The prompts, where they are echoed.
    echo: Option<Echo>,
    names: FieldNames,
    /// Where the lines are written. Once a frame has left for the socket its memory is used again.
    buffer: BytesMut,
    flush: Option<FlushHandle>,
    clock: DeliveryTimer,
    keep_alive: Option<Pin<Box<Sleep>>>,
    /// Whether there was nothing to write when the connection last asked.
    has_waited: bool,
    tokens_delivered: u64,
    ending: StreamState,
    counted: CountedRequest,
}

/// How a stream's events are told.
pub(super) struct StreamParts {
    pub(super) lines: LineWriter,
    /// The prompts, where they are echoed.
    pub(super) echo: Option<Echo>,
    /// How the client knows the field that is at fault.
    pub(super) names: FieldNames,
    /// What comes before all events.
    pub(super) first: BytesMut,
}

impl StreamParts {
    /// Nothing but these lines.
    pub(super) fn new(lines: LineWriter, names: FieldNames) -> Self {
        Self {
            lines,
            echo: None,
            names,
            first: BytesMut::new(),
        }
    }
}

/// What watches a response leave.
pub(super) struct DeliveryTracker {
    /// Its connection; `None` where nothing was listening.
    pub(super) flush: Option<FlushHandle>,
    pub(super) clock: DeliveryTimer,
}

/// How far the end has come.
enum StreamState {
    /// There is more.
    Open,
    /// All has been said.
    Whole,
    /// The error's record was handed over, all but this last byte.
    LastByte(Bytes),
    /// All of the record was handed over; it is on its way to the socket.
    Failing(Pin<Box<dyn Future<Output = ()> + Send>>),
    /// The record has left.
    Broken,
}

/// Why a body ends without its end. hyper closes or resets the stream for it.
#[derive(Debug, thiserror::Error)]
#[error("the completion failed; its last record says why")]
pub(super) struct StreamAborted;

/// The response whose body is this stream.
pub(super) fn response(body: Body, format: StreamFormat) -> Response<Body> {
    let content_type = match format {
        StreamFormat::Ndjson => "application/x-ndjson",
        StreamFormat::Sse => "text/event-stream; charset=utf-8",
    };
    let mut response = Response::new(body);
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

impl TokenBody {
    /// The body of a request of which a worker has begun.
    pub(super) fn new(
        completion_stream: CompletionStream,
        told: StreamParts,
        left: DeliveryTracker,
        counted: CountedRequest,
    ) -> Self {
        Self::of(Some(completion_stream), told, left, counted)
    }

    /// The rest of the body of a request that has failed, and the frame that comes before it.
    pub(super) fn failed(
        error: &Error,
        told: StreamParts,
        left: DeliveryTracker,
        counted: CountedRequest,
    ) -> (Self, Bytes) {
        let mut body = Self::of(None, told, left, counted);
        body.fail(error);
        let record = body.buffer.split().freeze();
        (body, record)
    }

    fn of(
        completion_stream: Option<CompletionStream>,
        told: StreamParts,
        left: DeliveryTracker,
        counted: CountedRequest,
    ) -> Self {
        let keep_alive = told
            .lines
            .keep_alive()
            .map(|_| Box::pin(sleep(KEEP_ALIVE_INTERVAL)));
        Self {
            completion_stream,
            lines: told.lines,
            echo: told.echo,
            names: told.names,
            buffer: told.first,
            flush: left.flush,
            clock: left.clock,
            keep_alive,
            has_waited: false,
            tokens_delivered: 0,
            ending: StreamState::Open,
            counted,
        }
    }

    /// Writes what is ready now. Pending when nothing is.
    fn poll_lines(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let turn = WriteStart::begin();
        // hyper asks again before it flushes. What it gets then is gathered: it did not wait for it.
        let has_waited = std::mem::take(&mut self.has_waited);
        let mut is_lone = false;
        while self.buffer.len() < MAX_FRAME_BYTES && !is_lone {
            let Some(completion_stream) = &mut self.completion_stream else {
                break;
            };
            match completion_stream.poll_next(cx) {
                Poll::Pending if self.buffer.is_empty() => {
                    self.has_waited = true;
                    return Poll::Pending;
                }
                Poll::Pending => break,
                Poll::Ready(Ok(MergedEvent::Started(started))) => {
                    self.lines.begun(started.prompt_tokens);
                }
                Poll::Ready(Ok(MergedEvent::Prompt(prompt, part))) => {
                    let taken = self.echo.as_mut().map(|echo| echo.take(prompt, part));
                    if let Some(Err(error)) = taken {
                        self.fail(&error);
                    }
                }
                Poll::Ready(Ok(MergedEvent::Tokens(tokens))) => {
                    is_lone =
                        has_waited && tokens.tokens.len() == 1 && completion_stream.choices() == 1;
                    self.write(&tokens, turn);
                }
                Poll::Ready(Ok(MergedEvent::Ended(usage, timings))) => self.end(usage, &timings),
                Poll::Ready(Err(error)) => self.fail(&error),
            }
        }
        Poll::Ready(self.buffer.split().freeze())
    }

    fn write(&mut self, tokens: &v1::Tokens, turn: WriteStart) {
        let choice = ChoiceTokens {
            index: tokens.choice,
            tokens: &tokens.tokens,
            finish_reason: finish_reason(tokens.finish_reason()),
        };
        if let Some(prompt) = self.echo.as_mut().and_then(|echo| echo.begin(choice.index)) {
            self.lines.prompt(&mut self.buffer, choice.index, &prompt);
        }
        self.lines.tokens(&mut self.buffer, &choice);
        let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
        self.tokens_delivered += count;
        self.clock.written(turn, count);
    }

    fn end(&mut self, usage: v1::Usage, timings: &v1::Timings) {
        let stages = self.clock.summaries();
        let timings = || timings::object(timings, stages);
        self.lines.last(&mut self.buffer, usage.into(), timings);
        self.lines.done(&mut self.buffer);
        self.counted.ended(Ok(()));
        self.completion_stream = None;
        self.ending = StreamState::Whole;
    }

    fn fail(&mut self, error: &Error) {
        let buffer = &mut self.buffer;
        let told = self.names.with_client_field_name(error.clone());
        self.lines.error(buffer, &told, self.tokens_delivered);
        self.counted.ended(Err(error));
        self.completion_stream = None;
        // On HTTP/2 hyper takes a frame as soon as the peer's window has room for a byte of it, and
        // then asks for the next. With a frame of one byte that byte is the record's last.
        let last = buffer.split_off(buffer.len() - 1);
        self.ending = StreamState::LastByte(last.freeze());
    }

    /// Waits until the record has left for the socket.
    fn flushed(&mut self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let flush = self.flush.take();
        Box::pin(async move {
            // Asked only when the last byte has been taken: on the next poll.
            if let Some(flush) = flush {
                flush.wait(ERROR_FLUSH_TIMEOUT).await;
                if flush.is_http2() {
                    sleep(HTTP2_RESET_DELAY).await;
                }
            }
        })
    }

    /// A comment when the stream has been silent for long.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let (Some(timer), Some(comment)) = (&mut self.keep_alive, self.lines.keep_alive()) else {
            return Poll::Pending;
        };
        ready!(timer.as_mut().poll(cx));
        timer.as_mut().reset(Instant::now() + KEEP_ALIVE_INTERVAL);
        Poll::Ready(comment)
    }
}

impl http_body::Body for TokenBody {
    type Data = Bytes;
    type Error = StreamAborted;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamAborted>>> {
        let this = self.get_mut();
        match &mut this.ending {
            StreamState::Open => {}
            StreamState::Whole => return Poll::Ready(None),
            StreamState::LastByte(last) => {
                let last = std::mem::take(last);
                this.ending = StreamState::Failing(this.flushed());
                return Poll::Ready(Some(Ok(Frame::data(last))));
            }
            StreamState::Failing(flushed) => {
                ready!(flushed.as_mut().poll(cx));
                this.ending = StreamState::Broken;
                return Poll::Ready(Some(Err(StreamAborted)));
            }
            StreamState::Broken => return Poll::Ready(None),
        }
        match this.poll_lines(cx) {
            Poll::Ready(lines) => {
                if let Some(timer) = &mut this.keep_alive {
                    timer.as_mut().reset(Instant::now() + KEEP_ALIVE_INTERVAL);
                }
                Poll::Ready(Some(Ok(Frame::data(lines))))
            }
            Poll::Pending => this
                .poll_keep_alive(cx)
                .map(|comment| Some(Ok(Frame::data(comment)))),
        }
    }
}
