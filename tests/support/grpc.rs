//! Completions over the gRPC API: reads their streams to the end and checks them.

use tokenway::error::Error;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::completion_request::Input;
use tonic::{Code, Status, Streaming};

use super::TestServer;

/// A completion stream that was read to its end.
#[derive(Debug, Default)]
pub struct Completion {
    pub started: Option<v1::Started>,
    pub prompt: Prompt,
    /// Tokens and finish reason of each choice.
    pub choices: Vec<Choice>,
    /// Parts of the messages besides their text.
    pub chat: Vec<v1::ChatDelta>,
    pub summary: Option<v1::Summary>,
    pub error: Option<Status>,
}

/// The echoed prompt.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    pub text: String,
    pub tokens: Vec<v1::Token>,
}

#[derive(Clone, Debug, Default)]
pub struct Choice {
    pub tokens: Vec<v1::Token>,
    pub finish: v1::FinishReason,
}

/// Creates a request for up to `max_tokens` tokens.
pub fn request(prompt: &str, max_tokens: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(Input::Prompt(prompt.to_owned())),
        max_tokens: Some(max_tokens),
        ..v1::CompletionRequest::default()
    }
}

/// Sends a request that must be rejected. Returns the status code and the error of the rejection.
pub async fn grpc_error(server: &TestServer, request: v1::CompletionRequest) -> (Code, Error) {
    let response = server.grpc().await.complete(request).await;
    let status = response.expect_err("the request is rejected");
    (status.code(), Error::from(&status))
}

/// Reads a stream to its end. Checks that the token indices have no gap.
pub async fn collect(stream: Streaming<v1::CompletionEvent>) -> Completion {
    collect_from(stream, |_| ()).await
}

/// Like `collect`. After each event, calls `progress` with the number of tokens that the first choice has.
pub async fn collect_from(
    mut stream: Streaming<v1::CompletionEvent>,
    mut progress: impl FnMut(u32),
) -> Completion {
    let mut completion = Completion::default();
    loop {
        match stream.message().await {
            Ok(Some(event)) => {
                assert!(
                    completion.summary.is_none(),
                    "an event follows the summary: {event:?}"
                );
                completion.add_event(event);
                progress(u32::try_from(completion.token_count(0)).expect("the count fits in u32"));
            }
            Ok(None) => return completion,
            Err(status) => {
                completion.error = Some(status);
                return completion;
            }
        }
    }
}

impl Completion {
    pub fn add_event(&mut self, event: v1::CompletionEvent) {
        match event.event.expect("the event has a known type") {
            Event::Started(started) => {
                assert!(
                    self.started.is_none() && self.choices.is_empty(),
                    "`started` comes first"
                );
                self.started = Some(started);
            }
            Event::Prompt(part) => {
                assert!(self.started.is_some(), "`started` comes first");
                assert!(
                    self.choices.is_empty(),
                    "the prompt comes before the tokens"
                );
                self.prompt.text.push_str(&part.text);
                if let Some(tokens) = part.tokens {
                    let known = &mut self.prompt.tokens;
                    assert_eq!(
                        usize::try_from(tokens.first_index),
                        Ok(known.len()),
                        "the token indices have a gap"
                    );
                    known.extend(tokens.tokens.iter().map(v1::Token::from));
                }
            }
            Event::Tokens(tokens) => {
                let at = usize::try_from(tokens.choice).expect("a choice index");
                if self.choices.len() <= at {
                    self.choices.resize(at + 1, Choice::default());
                }
                let finish = tokens.finish_reason();
                let choice = &mut self.choices[at];
                assert_eq!(
                    usize::try_from(tokens.first_index),
                    Ok(choice.tokens.len()),
                    "the token indices have a gap"
                );
                assert_eq!(
                    choice.finish,
                    v1::FinishReason::Unspecified,
                    "tokens follow the finish reason"
                );
                choice
                    .tokens
                    .extend(tokens.tokens.iter().map(v1::Token::from));
                choice.finish = finish;
            }
            Event::Chat(delta) => {
                assert!(self.started.is_some(), "`started` comes first");
                let choice = usize::try_from(delta.choice).expect("a choice index");
                let has_ended = self
                    .choices
                    .get(choice)
                    .is_some_and(|it| it.finish != v1::FinishReason::Unspecified);
                assert!(!has_ended, "a delta follows the finish reason");
                self.chat.push(delta);
            }
            Event::Summary(summary) => self.summary = Some(summary),
        }
    }

    /// Returns the number of tokens received for a choice.
    pub fn token_count(&self, choice: usize) -> usize {
        self.choices.get(choice).map_or(0, |it| it.tokens.len())
    }

    pub fn texts(&self, choice: usize) -> Vec<&str> {
        self.choices[choice]
            .tokens
            .iter()
            .map(|token| token.text.as_str())
            .collect()
    }

    pub fn timings(&self) -> v1::Timings {
        self.summary
            .as_ref()
            .and_then(|summary| summary.timings)
            .expect("the summary has timings")
    }

    pub fn usage(&self) -> v1::Usage {
        self.summary
            .as_ref()
            .and_then(|summary| summary.usage)
            .expect("the summary has a usage")
    }
}
