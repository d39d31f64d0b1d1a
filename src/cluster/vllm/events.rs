//! The responses of one `GenerateStream`, as completion events.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio_stream::Stream;
use tonic::Status;
use vllm_proto::GenerateResponse;

use super::progress::{Progress, RequestFacts};
use super::rejection::{broken_stream, in_stream};
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// The events of one completion. The stream ends after the summary or after one error. Dropping it cancels the
/// engine's work.
pub(super) struct EngineEvents<S> {
    responses: S,
    progress: Progress,
    /// The error to return after the events that are ready.
    failure: Option<Error>,
    has_summary: bool,
    ended: bool,
}

impl<S> EngineEvents<S>
where
    S: Stream<Item = Result<GenerateResponse, Status>> + Unpin,
{
    pub(super) fn new(responses: S, facts: RequestFacts) -> Self {
        Self {
            responses,
            progress: Progress::new(facts),
            failure: None,
            has_summary: false,
            ended: false,
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Error>>> {
        loop {
            // The tokens before an error are returned before it.
            if let Some(event) = self.progress.next_event() {
                self.has_summary |= matches!(event, Event::Summary(_));
                return Poll::Ready(Some(Ok(event)));
            }
            if let Some(error) = self.failure.take() {
                self.ended = true;
                return Poll::Ready(Some(Err(error)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let response = ready!(Pin::new(&mut self.responses).poll_next(cx));
            if self.has_summary {
                // The response is whole. The engine's status was read only because dropping the stream before it
                // arrives would reset the RPC.
                self.ended = true;
                continue;
            }
            let read = match response {
                Some(Ok(response)) => self.progress.read(response),
                Some(Err(status)) => Err(in_stream(&status)),
                None => Err(broken_stream()),
            };
            self.failure = read.err();
        }
    }
}

impl<S> Stream for EngineEvents<S>
where
    S: Stream<Item = Result<GenerateResponse, Status>> + Unpin,
{
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = ready!(self.get_mut().poll_event(cx));
        Poll::Ready(event.map(|event| {
            event
                .map(|event| v1::CompletionEvent { event: Some(event) })
                .map_err(Status::from)
        }))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;
    use tokio_stream::StreamExt;
    use vllm_proto::finish_info::FinishReason;
    use vllm_proto::{FinishInfo, PromptInfo, SequenceOutput};

    use super::*;

    /// Returns a whole response in one message.
    fn whole() -> GenerateResponse {
        GenerateResponse {
            prompt_info: Some(PromptInfo::default()),
            outputs: Some(SequenceOutput {
                finish_info: Some(FinishInfo {
                    finish_reason: FinishReason::Stop.into(),
                    ..FinishInfo::default()
                }),
                ..SequenceOutput::default()
            }),
        }
    }

    /// Returns the events of a stream with one choice, each as its kind.
    async fn kinds(responses: Vec<Result<GenerateResponse, Status>>) -> Vec<&'static str> {
        let facts = RequestFacts {
            request_id: String::new(),
            model: String::new(),
            choices: 1,
            seed: 0,
            has_logprobs: false,
            arrived: Instant::now(),
        };
        EngineEvents::new(tokio_stream::iter(responses), facts)
            .map(|event| match event.map(|event| event.event) {
                Ok(Some(Event::Started(_))) => "started",
                Ok(Some(Event::Tokens(_))) => "tokens",
                Ok(Some(Event::Summary(_))) => "summary",
                Ok(Some(Event::Prompt(_) | Event::Chat(_)) | None) => "unexpected",
                Err(_) => "error",
            })
            .collect()
            .await
    }

    #[tokio::test]
    async fn nothing_follows_the_summary() {
        let expected = ["started", "tokens", "summary"];
        for late in [Ok(whole()), Err(Status::internal("late"))] {
            assert_eq!(kinds(vec![Ok(whole()), late]).await, expected);
        }
        assert_eq!(kinds(vec![Ok(whole())]).await, expected);
    }

    #[tokio::test]
    async fn nothing_follows_an_error() {
        let broken = || Err(Status::internal("broken"));
        assert_eq!(
            kinds(vec![broken(), broken(), Ok(whole())]).await,
            ["error"]
        );
        assert_eq!(kinds(Vec::new()).await, ["error"]);
    }
}
