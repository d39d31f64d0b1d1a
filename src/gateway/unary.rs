//! Unary responses: a completion is collected and returned as one JSON body.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;
use tokio::task::coop::consume_budget;

use super::completion_stream::{CompletionStream, MergedEvent, finish_reason};
use super::dialect::{CollectedChoice, ResponseOptions, ScoredTokens};
use super::echoed_prompts::{EchoedPrompts, PromptEcho};
use super::large_json::LargeJson;
use super::response_size;
use crate::context::RequestContext;
use crate::delivery::TokenMeter;
use crate::error::Error;
use crate::proto::v1;
use crate::runner::monotonic_ns;
use crate::tokens::TextToken;

/// A completion to collect, and its response options.
pub(super) struct ResponseCollector {
    pub(super) stream: CompletionStream,
    /// Prompts to repeat, if the request sets `echo`.
    pub(super) echo: Option<EchoedPrompts>,
    /// Number of choices that the engine generates per prompt.
    pub(super) candidates: u32,
    pub(super) response: ResponseOptions,
    pub(super) context: RequestContext,
}

/// Collects the whole completion. Then builds the response with the JSON object that `unary_body` returns.
///
/// # Errors The completion fails or becomes too large. Then no part of it is sent.
pub(super) async fn collect<A: Serialize>(
    collecting: ResponseCollector,
    large_json: &LargeJson,
    answer: impl FnOnce(Vec<CollectedChoice>, v1::Usage) -> A + Send + 'static,
) -> Result<Response, Error> {
    let collected = CollectedResponse::read(collecting).await?;
    let size = collected.size;
    let object = move || answer(collected.choices, collected.usage);
    large_json.write(size, object).await
}

/// A completion that has ended.
struct CollectedResponse {
    choices: Vec<CollectedChoice>,
    usage: v1::Usage,
    /// Estimated size of the response, in bytes.
    size: usize,
}

impl CollectedResponse {
    async fn read(collecting: ResponseCollector) -> Result<Self, Error> {
        let ResponseCollector {
            mut stream,
            mut echo,
            candidates,
            response,
            context,
        } = collecting;
        let mut meter = TokenMeter::new(context.record());
        let mut choices: Vec<Candidate> = (0..stream.choices())
            .map(|_| Candidate::new(response.logprobs.is_some()))
            .collect();
        let mut total_size: usize = 0;
        let mut reserved = 0;
        let mut is_text_only = stream.first_started().text_only;
        let usage = loop {
            // With a fast device, the next event is always ready. This lets the other tasks of the thread run.
            consume_budget().await;
            if total_size > reserved {
                reserved = total_size.saturating_add(total_size / 4);
                let bytes = u64::try_from(reserved).unwrap_or(u64::MAX);
                context.memory_shares().wait_for_response(bytes).await?;
            }
            match stream.next().await? {
                MergedEvent::Started(started) => {
                    is_text_only = started.text_only;
                    context.record_start(started.prompt_tokens);
                }
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
                        choice.set_prompt(prompt);
                    }
                    let count = u64::try_from(tokens.tokens.len()).unwrap_or(0);
                    meter.record_written(tokens.choice, count, monotonic_ns());
                    total_size += response_size::tokens_size(&tokens.tokens);
                    choice.add(tokens);
                    response_size::check_unary(total_size)?;
                }
                MergedEvent::Chat(delta) => {
                    let count = is_text_only.into();
                    meter.record_written(delta.choice, count, monotonic_ns());
                    total_size += response_size::chat_delta_size(&delta);
                    choices[to_usize(delta.choice)].choice.chat.add(delta);
                    response_size::check_unary(total_size)?;
                }
                MergedEvent::Ended(usage, _) => break usage,
            }
        };
        context.set_usage(usage.prompt_tokens, usage.completion_tokens);
        meter.record_end(Ok(()));
        let choices = select_most_likely(choices, candidates, response.choices);
        Ok(Self {
            choices: choices.into_iter().map(|one| one.choice).collect(),
            usage,
            size: total_size,
        })
    }
}

/// The parts of a generated choice received so far.
struct Candidate {
    choice: CollectedChoice,
    /// Sum of the log probabilities of the generated tokens.
    total_logprob: f64,
    /// Number of tokens whose log probabilities are in `total_logprob`.
    scored_tokens: u32,
}

impl Candidate {
    fn new(has_logprobs: bool) -> Self {
        Self {
            choice: CollectedChoice {
                scored: has_logprobs.then(ScoredTokens::default),
                ..CollectedChoice::default()
            },
            total_logprob: 0.0,
            scored_tokens: 0,
        }
    }

    /// Puts the prompt before the choice's text.
    fn set_prompt(&mut self, prompt: Arc<PromptEcho>) {
        self.choice.text.push_str(&prompt.text);
        if let Some(scored) = &mut self.choice.scored {
            scored.prompt = Some(prompt);
        }
    }

    fn add(&mut self, tokens: v1::Tokens) {
        self.choice.finish_reason = finish_reason(&tokens).or(self.choice.finish_reason);
        self.choice.text.push_str(tokens.tokens.text());
        for token in tokens.tokens.iter() {
            self.add_score(&token);
        }
        if let Some(scored) = &mut self.choice.scored {
            scored.generated.push(tokens.tokens);
        }
    }

    fn add_score(&mut self, token: &TextToken<'_>) {
        if let Some(logprob) = token.logprobs.and_then(|logprobs| logprobs.logprob) {
            self.total_logprob += f64::from(logprob);
            self.scored_tokens += 1;
        }
    }

    /// Returns the mean log probability per token. With the mean, long choices are not at a disadvantage.
    fn mean_logprob(&self) -> f64 {
        self.total_logprob / f64::from(self.scored_tokens.max(1))
    }
}

/// Returns the choices of the response: the `n` most likely choices of each prompt with `best_of`, and otherwise all.
fn select_most_likely(mut choices: Vec<Candidate>, candidates: u32, n: u32) -> Vec<Candidate> {
    if n == candidates {
        return choices;
    }
    let mut selected = Vec::new();
    while !choices.is_empty() {
        let candidates = to_usize(candidates).min(choices.len());
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
