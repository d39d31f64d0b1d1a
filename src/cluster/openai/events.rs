//! Converts the streamed response of an OpenAI-compatible engine into completion events.
//!
//! The body is read only after all its events have been returned, and then by at most [`MAX_FRAMES`] frames, so a slow
//! client slows the engine down. Dropping the stream closes the connection, which cancels the engine's work.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Body as _;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_stream::Stream;
use tonic::Status;

use super::client::ResponseBody;
use super::progress::{Progress, RequestFacts, broken_stream};
use super::server_sent_events::EventSplitter;
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Maximum wait for the usage after the last choice has ended. Some engines send no usage and no end marker, and keep
/// the connection open.
const USAGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum wait for the end of the body after the last choice has ended, if nothing else is missing. Only a body that
/// was read to its end lets the next request use its connection.
const BODY_END_TIMEOUT: Duration = Duration::from_millis(50);

/// Maximum number of frames of the body that are read together. vLLM and llama.cpp write each token as an
/// HTTP chunk, which is a frame.
const MAX_FRAMES: usize = 256;

/// The events of one completion.
pub(super) struct EngineEvents {
    body: ResponseBody,
    splitter: EventSplitter,
    progress: Progress,
    /// The end of the response, or the error to return, after the events that are ready.
    end: Option<Result<(), Error>>,
    /// The time when all choices had ended, and the timer for the rest of the body.
    end_timer: Option<(Instant, Pin<Box<Sleep>>)>,
    ended: bool,
}

impl EngineEvents {
    pub(super) fn new(body: ResponseBody, facts: RequestFacts) -> Self {
        Self {
            body,
            splitter: EventSplitter::default(),
            progress: Progress::new(facts),
            end: None,
            end_timer: None,
            ended: false,
        }
    }

    /// Reads what has arrived. Pending until there is an event, or the end of the response.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..MAX_FRAMES {
            match self.poll_frame(cx) {
                Poll::Ready(Some(frame)) => self.read_frame(frame),
                Poll::Ready(None) => self.end = Some(self.progress.check_end()),
                Poll::Pending if !self.progress.ready.is_empty() => break,
                Poll::Pending if self.poll_end_timeout(cx) => self.end = Some(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
            if self.end.is_some() {
                break;
            }
        }
        Poll::Ready(())
    }

    /// Reads all events that end in this frame of the body.
    fn read_frame(&mut self, frame: Bytes) {
        self.splitter.push(frame);
        while self.end.is_none()
            && let Some(event) = self.splitter.next_event().transpose()
        {
            let event = event.map_err(|_| broken_stream());
            let read = event.and_then(|event| self.progress.read(&event));
            self.end = read.err().map(Err);
        }
    }

    /// Returns the next data of the body, or `None` at its end and if the connection breaks.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(data));
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "the connection to an engine broke");
                    return Poll::Ready(None);
                }
                None => return Poll::Ready(None),
            }
        }
    }

    /// Returns true if all choices have ended and the rest of the body is no longer waited for.
    fn poll_end_timeout(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.progress.all_choices_ended() {
            return false;
        }
        let timeout = if self.progress.is_whole() {
            BODY_END_TIMEOUT
        } else {
            USAGE_TIMEOUT
        };
        let (since, timer) = self.end_timer.get_or_insert_with(|| {
            let now = Instant::now();
            (now, Box::pin(sleep_until(now)))
        });
        timer.as_mut().reset(*since + timeout);
        timer.as_mut().poll(cx).is_ready()
    }
}

impl Stream for EngineEvents {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let event = loop {
            if let Some(event) = this.progress.ready.pop_front() {
                break Ok(event);
            }
            match this.end.take() {
                Some(Ok(())) => break Ok(Event::Summary(this.progress.summary())),
                Some(Err(error)) => break Err(Status::from(error)),
                None => ready!(this.poll_body(cx)),
            }
        };
        this.ended = matches!(event, Ok(Event::Summary(_)) | Err(_));
        Poll::Ready(Some(
            event.map(|event| v1::CompletionEvent { event: Some(event) }),
        ))
    }
}
