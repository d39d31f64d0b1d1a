//! Unary responses: collects a completion and returns it as one JSON body.

use axum::response::Response;

use super::body::{ParsedBody, ResponseOptions, Route};
use super::completion_stream::{CompletionStream, MergedEvent};
use super::echo::{Echo, Prompt};
use super::lines::ResponseMetadata;
use super::logprobs::{ChatLogprobs, CompletionLogprobs, char_count};
use super::response::{
    self, ChatAnswer, ChatChoice, ChatCompletion, Completion, CompletionChoice, finish_reason,
};
use super::size;
use crate::context::RequestContext;
use crate::delivery::TokenMeter;
use crate::error::Error;
use crate::proto::v1;
use crate::runner::monotonic_ns;
use crate::tokens::TextToken;

/// A completion to collect, and what its response needs.
pub(super) struct Collecting {
    pub(super) stream: CompletionStream,
    /// Prompts to repeat, if the request sets `echo`.
    pub(super) echo: Option<Echo>,
    pub(super) metadata: ResponseMetadata,
    pub(super) context: RequestContext,
}

/// Collects the whole completion, then builds the response.
///
/// # Errors
/// If the completion fails or becomes too large. No part of it is sent then.
pub(super) async fn collect(collecting: Collecting, body: &ParsedBody) -> Result<Response, Error> {
    let Collecting {
        mut stream,
        mut echo,
        metadata,
        context,
    } = collecting;
    let mut meter = TokenMeter::new(context.record());
    let choice = || Choice::new(metadata.route, body.response.logprobs.is_some());
    let mut choices: Vec<Choice> = std::iter::repeat_with(choice)
        .take(stream.choices())
        .collect();
    let mut total_size = 0;
    let usage = loop {
        match stream.next().await? {
            MergedEvent::Started(started) => context.started(started.prompt_tokens),
            MergedEvent::Prompt(prompt, part) => {
                if let Some(echo) = &mut echo {
                    echo.add(prompt, part)?;
                }
            }
            MergedEvent::Tokens(tokens) => {
                let choice = &mut choices[to_usize(tokens.choice)];
                let echo = echo.as_mut();
                if let Some(prompt) = echo.and_then(|echo| echo.start_choice(tokens.choice)) {
                    total_size += prompt.size;
                    choice.set_prompt(&prompt);
                }
                choice.add(&tokens);
                let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
                meter.written(tokens.choice, count, monotonic_ns());
                total_size += size::of_tokens(&tokens.tokens);
                size::check_unary(total_size)?;
            }
            MergedEvent::Ended(usage, _) => break usage,
        }
    };
    context.set_usage(usage.prompt_tokens, usage.completion_tokens);
    meter.ended(Ok(()));
    let choices = select_likeliest(choices, body);
    if total_size < size::BLOCKING_THRESHOLD {
        return Ok(build_response(choices, metadata, usage));
    }
    // Encoding a large response would block this thread's other tasks.
    let response = tokio::task::spawn_blocking(move || build_response(choices, metadata, usage));
    response.await.map_err(|_| Error::internal())
}

/// The parts of a choice received so far.
struct Choice {
    text: String,
    finish_reason: Option<&'static str>,
    logprobs: Option<ChoiceLogprobs>,
    /// Sum of the log probabilities of the generated tokens.
    total_logprob: f64,
    /// Number of tokens in `total_logprob`.
    scored_tokens: u32,
}

enum ChoiceLogprobs {
    Completion(CompletionLogprobs),
    Chat(ChatLogprobs),
}

impl Choice {
    fn new(route: Route, has_logprobs: bool) -> Self {
        Self {
            text: String::new(),
            finish_reason: None,
            logprobs: has_logprobs.then(|| match route {
                Route::Completions => ChoiceLogprobs::Completion(CompletionLogprobs::default()),
                Route::Chat => ChoiceLogprobs::Chat(ChatLogprobs::default()),
            }),
            total_logprob: 0.0,
            scored_tokens: 0,
        }
    }

    /// Starts the choice with the text and log probabilities of its prompt.
    fn set_prompt(&mut self, prompt: &Prompt) {
        self.text.push_str(&prompt.text);
        if let Some(ChoiceLogprobs::Completion(logprobs)) = &mut self.logprobs {
            *logprobs = prompt.logprobs();
        }
    }

    fn add(&mut self, tokens: &v1::Tokens) {
        self.finish_reason = finish_reason(tokens.finish_reason()).or(self.finish_reason);
        let mut offset = match &self.logprobs {
            Some(ChoiceLogprobs::Completion(_)) => char_count(&self.text),
            Some(ChoiceLogprobs::Chat(_)) | None => 0,
        };
        self.text.push_str(tokens.tokens.text());
        for token in tokens
            .tokens
            .iter()
            .filter(|token| token.logprobs.is_some())
        {
            self.add_score(&token);
            match &mut self.logprobs {
                Some(ChoiceLogprobs::Completion(logprobs)) => {
                    logprobs.push(&token, offset);
                    offset += char_count(token.text);
                }
                Some(ChoiceLogprobs::Chat(logprobs)) => logprobs.push(&token),
                None => {}
            }
        }
    }

    fn add_score(&mut self, token: &TextToken<'_>) {
        if let Some(logprob) = token.logprobs.and_then(|logprobs| logprobs.logprob) {
            self.total_logprob += f64::from(logprob);
            self.scored_tokens += 1;
        }
    }

    /// Mean log probability per token, so that long choices are not at a disadvantage.
    fn mean_logprob(&self) -> f64 {
        self.total_logprob / f64::from(self.scored_tokens.max(1))
    }
}

/// Returns the choices of the response: with `best_of` the `n` likeliest of each prompt, otherwise all.
fn select_likeliest(mut choices: Vec<Choice>, body: &ParsedBody) -> Vec<Choice> {
    let ResponseOptions { choices: n, .. } = body.response;
    if n == body.candidates {
        return choices;
    }
    let mut selected = Vec::new();
    while !choices.is_empty() {
        let candidates = to_usize(body.candidates).min(choices.len());
        let other_prompts = choices.split_off(candidates);
        choices.sort_by(|one, other| other.mean_logprob().total_cmp(&one.mean_logprob()));
        choices.truncate(to_usize(n));
        selected.append(&mut choices);
        choices = other_prompts;
    }
    selected
}

fn to_usize(choices: u32) -> usize {
    usize::try_from(choices).expect("a request has at most 128 choices")
}

fn build_response(choices: Vec<Choice>, metadata: ResponseMetadata, usage: v1::Usage) -> Response {
    let choices = (0..).zip(choices);
    let ResponseMetadata {
        route,
        id,
        created,
        model,
    } = metadata;
    match route {
        Route::Completions => response::json(&Completion {
            id,
            object: "text_completion",
            created,
            model,
            choices: choices
                .map(|(index, choice)| completion_choice(index, choice))
                .collect(),
            usage: usage.into(),
        }),
        Route::Chat => response::json(&ChatCompletion {
            id,
            object: "chat.completion",
            created,
            model,
            choices: choices
                .map(|(index, choice)| chat_choice(index, choice))
                .collect(),
            usage: usage.into(),
        }),
    }
}

fn completion_choice(index: u32, choice: Choice) -> CompletionChoice {
    CompletionChoice {
        index,
        text: choice.text,
        logprobs: match choice.logprobs {
            Some(ChoiceLogprobs::Completion(logprobs)) => Some(logprobs),
            Some(ChoiceLogprobs::Chat(_)) | None => None,
        },
        finish_reason: choice.finish_reason,
    }
}

fn chat_choice(index: u32, choice: Choice) -> ChatChoice {
    ChatChoice {
        index,
        message: ChatAnswer {
            role: "assistant",
            content: choice.text,
            refusal: None,
        },
        logprobs: match choice.logprobs {
            Some(ChoiceLogprobs::Chat(logprobs)) => Some(logprobs),
            Some(ChoiceLogprobs::Completion(_)) | None => None,
        },
        finish_reason: choice.finish_reason,
    }
}
