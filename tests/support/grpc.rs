//! Completions over the gRPC door, collected.

use tokenway::error::Error;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::completion_request::Input;
use tonic::{Code, Status, Streaming};

use super::TestServer;

/// A completion that was read to its end.
#[derive(Debug, Default)]
pub struct Completion {
    pub started: Option<v1::Started>,
    pub prompt: Prompt,
    /// Each choice's tokens.
    pub choices: Vec<Choice>,
    pub summary: Option<v1::Summary>,
    pub error: Option<Status>,
}

/// The prompt, as far as it was told.
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

/// A request for this many tokens.
pub fn request(prompt: &str, max_tokens: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(Input::Prompt(prompt.to_owned())),
        max_tokens: Some(max_tokens),
        ..v1::CompletionRequest::default()
    }
}

/// What the gRPC door says to a request that it refuses.
pub async fn grpc_error(server: &TestServer, request: v1::CompletionRequest) -> (Code, Error) {
    let answer = server.grpc().await.complete(request).await;
    let status = answer.expect_err("a refusal");
    (status.code(), Error::from(&status))
}

/// Reads a stream to its end, checking the indices.
pub async fn collect(stream: Streaming<v1::CompletionEvent>) -> Completion {
    collect_from(stream, |_| ()).await
}

/// Reads a stream to its end, checking the indices; `seen` is told how many tokens of the first choice have come.
pub async fn collect_from(
    mut stream: Streaming<v1::CompletionEvent>,
    mut seen: impl FnMut(u32),
) -> Completion {
    let mut completion = Completion::default();
    loop {
        match stream.message().await {
            Ok(Some(event)) => {
                assert!(
                    completion.summary.is_none(),
                    "something follows the summary: {event:?}"
                );
                completion.take(event);
                seen(u32::try_from(completion.count(0)).expect("a test's tokens are few"));
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
    pub fn take(&mut self, event: v1::CompletionEvent) {
        match event.event.expect("an event is one of them") {
            Event::Started(started) => {
                assert!(
                    self.started.is_none() && self.choices.is_empty(),
                    "a start is first"
                );
                self.started = Some(started);
            }
            Event::Prompt(part) => {
                assert!(self.started.is_some(), "a start is first");
                assert!(self.choices.is_empty(), "the prompt is before the tokens");
                self.prompt.text.push_str(&part.text);
                if let Some(tokens) = part.tokens {
                    let known = &mut self.prompt.tokens;
                    assert_eq!(
                        usize::try_from(tokens.first_index),
                        Ok(known.len()),
                        "a gap"
                    );
                    known.extend(tokens.tokens.iter().map(v1::Token::from));
                }
            }
            Event::Tokens(tokens) => {
                let at = usize::try_from(tokens.choice).expect("a choice's number");
                if self.choices.len() <= at {
                    self.choices.resize(at + 1, Choice::default());
                }
                let finish = tokens.finish_reason();
                let choice = &mut self.choices[at];
                assert_eq!(
                    usize::try_from(tokens.first_index),
                    Ok(choice.tokens.len()),
                    "a gap"
                );
                assert_eq!(
                    choice.finish,
                    v1::FinishReason::Unspecified,
                    "tokens after the end"
                );
                choice
                    .tokens
                    .extend(tokens.tokens.iter().map(v1::Token::from));
                choice.finish = finish;
            }
            Event::Summary(summary) => self.summary = Some(summary),
        }
    }

    /// How many tokens of a choice have come so far.
    pub fn count(&self, choice: usize) -> usize {
        self.choices.get(choice).map_or(0, |it| it.tokens.len())
    }

    pub fn texts(&self, choice: usize) -> Vec<&str> {
        self.choices[choice]
            .tokens
            .iter()
            .map(|token| token.text.as_str())
            .collect()
    }

    pub fn usage(&self) -> v1::Usage {
        self.summary
            .as_ref()
            .and_then(|summary| summary.usage)
            .expect("a summary with its usage")
    }
}
