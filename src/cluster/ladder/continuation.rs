//! The requests that continue a completion on another engine.

use super::delivered::{Delivered, DeliveredChoice};
use super::rung::Rung;
use super::seam::{ChoiceSeam, Seam};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::TokenId;

/// A continuation of a completion: the requests to send, and the seam to their streams.
#[derive(Debug)]
pub(in crate::cluster) struct Continuation {
    pub(in crate::cluster) requests: Requests,
    pub(in crate::cluster) seam: Seam,
}

/// The requests of a continuation.
#[derive(Debug)]
pub(in crate::cluster) enum Requests {
    /// One request for all choices.
    Whole(Box<v1::CompletionRequest>),
    /// One request for each choice that has not ended. Each asks for a single choice.
    PerChoice(Vec<ChoiceRequest>),
}

/// A request that continues one choice.
#[derive(Debug)]
pub(in crate::cluster) struct ChoiceRequest {
    pub(in crate::cluster) choice: u32,
    pub(in crate::cluster) message: v1::CompletionRequest,
    /// True if the chat's last message is the start of the assistant's answer, which the engine must continue.
    pub(in crate::cluster) continues_message: bool,
    /// Number of tokens that the choice may still have after the delivered text. `Some(0)` if it has reached its limit,
    /// and must not be sent.
    pub(in crate::cluster) tokens_left: Option<u32>,
    /// Number of tokens of the choice that the request contains.
    pub(in crate::cluster) delivered_tokens: u32,
    /// Number of tokens of the choice that the client has and the request does not contain. The engine generates and
    /// counts them again.
    pub(in crate::cluster) repeated_tokens: u32,
}

/// Facts about the target that a continuation depends on.
#[derive(Clone, Debug, Default)]
pub(in crate::cluster) struct TargetFacts {
    /// Token ids of the prompt. Only for [`Rung::TokenIds`].
    pub(in crate::cluster) prompt_ids: Vec<TokenId>,
    /// Seed that the interrupted stream used.
    pub(in crate::cluster) seed: i64,
}

/// Builds the continuation of a completion by this rung.
pub(in crate::cluster) fn continuation(
    rung: Rung,
    message: &v1::CompletionRequest,
    delivered: &Delivered,
    facts: &TargetFacts,
) -> Continuation {
    match rung {
        Rung::Resume => resumption(message, delivered, facts.seed),
        Rung::Replay => Continuation {
            requests: Requests::Whole(Box::new(v1::CompletionRequest {
                seed: Some(facts.seed),
                ..message.clone()
            })),
            seam: Seam::replaying(delivered),
        },
        Rung::TokenIds => per_choice(message, delivered, facts.seed, |choice| {
            // A character of which only the first tokens were delivered is generated again.
            let whole = choice.ids.len() - choice.trailing_without_text.min(choice.ids.len());
            let ids = facts.prompt_ids.iter().chain(&choice.ids[..whole]);
            let prompt = v1::TokenIds {
                ids: ids.copied().collect(),
            };
            ContinuedChoice {
                input: Some(Input::PromptTokenIds(prompt)),
                seam: ChoiceSeam {
                    repeated_tokens: choice.ids.len() - whole,
                    ..ChoiceSeam::default()
                },
                continues_message: false,
                repeated: choice.ids.len() - whole,
            }
        }),
        Rung::Text => per_choice(message, delivered, facts.seed, |choice| {
            continued_by_text(message, choice)
        }),
    }
}

fn resumption(message: &v1::CompletionRequest, delivered: &Delivered, seed: i64) -> Continuation {
    let mut choices = Vec::new();
    let mut resume = Vec::new();
    for (index, choice) in (0..).zip(&delivered.choices) {
        // The engine ends an ended choice once more, because it generates the last token again.
        let known = choice.ids.len() - usize::from(choice.has_ended && !choice.ids.is_empty());
        choices.push(ChoiceSeam {
            engine_index: u32::try_from(known).unwrap_or(u32::MAX),
            is_dropped: choice.has_ended,
            ..ChoiceSeam::default()
        });
        if known > 0 {
            resume.push(v1::ResumedChoice {
                choice: index,
                token_ids: choice.ids[..known].to_vec(),
            });
        }
    }
    let has_tokens = delivered.token_count() > 0;
    Continuation {
        requests: Requests::Whole(Box::new(v1::CompletionRequest {
            seed: Some(seed),
            resume,
            // The whole prompt is echoed before the first token.
            echo: message.echo && !has_tokens,
            ..message.clone()
        })),
        seam: Seam::new(choices),
    }
}

/// A choice to continue: its prompt, and the seam to the delivered tokens.
struct ContinuedChoice {
    input: Option<Input>,
    seam: ChoiceSeam,
    /// True if the prompt is a chat that ends with the start of the assistant's answer.
    continues_message: bool,
    /// Number of delivered tokens that the prompt leaves out.
    repeated: usize,
}

/// Builds one request for each choice that has not ended.
fn per_choice(
    message: &v1::CompletionRequest,
    delivered: &Delivered,
    seed: i64,
    input: impl Fn(&DeliveredChoice) -> ContinuedChoice,
) -> Continuation {
    let mut requests = Vec::new();
    let mut seams = Vec::new();
    for (index, choice) in (0..).zip(&delivered.choices) {
        if choice.has_ended {
            seams.push(ChoiceSeam {
                is_dropped: true,
                ..ChoiceSeam::default()
            });
            continue;
        }
        let ContinuedChoice {
            input,
            seam,
            continues_message,
            repeated,
        } = input(choice);
        let repeated = u32::try_from(repeated).unwrap_or(u32::MAX);
        let token_count = choice.likely_token_count(delivered.has_ids);
        let sent_tokens = token_count.saturating_sub(repeated);
        let limit = message.max_tokens;
        let without_text = u32::try_from(choice.counted_without_text()).unwrap_or(u32::MAX);
        let with_text = token_count.saturating_sub(without_text);
        let left_after = |tokens: u32| limit.map(|limit| limit.saturating_sub(tokens));
        let tokens_left = left_after(with_text);
        seams.push(match tokens_left {
            Some(0) => ChoiceSeam::default(),
            Some(_) | None => seam,
        });
        requests.push(ChoiceRequest {
            choice: index,
            continues_message,
            tokens_left,
            delivered_tokens: sent_tokens,
            repeated_tokens: token_count - sent_tokens,
            message: v1::CompletionRequest {
                input,
                n: Some(1),
                max_tokens: left_after(sent_tokens),
                min_tokens: message.min_tokens.saturating_sub(sent_tokens),
                // Another seed, so that the engine does not repeat the random draws of the first tokens.
                seed: Some(continued_seed(seed, index, choice.token_count)),
                resume: Vec::new(),
                ..message.clone()
            },
        });
    }
    Continuation {
        requests: Requests::PerChoice(requests),
        seam: Seam::new(seams),
    }
}

/// Returns a seed from 0 to 2^32 − 1, the range that every engine accepts.
fn continued_seed(seed: i64, choice: u32, tokens: u32) -> i64 {
    let draw = i64::from(choice) * 1_000_003 + i64::from(tokens);
    seed.wrapping_add(draw).rem_euclid(i64::from(u32::MAX))
}

/// Returns the prompt with the delivered text, or the chat with the start of the assistant's answer.
fn continued_by_text(message: &v1::CompletionRequest, choice: &DeliveredChoice) -> ContinuedChoice {
    // An engine that holds text back, because it may be part of a stop string, generates it again.
    let mut continued = ContinuedChoice {
        input: message.input.clone(),
        seam: ChoiceSeam {
            repeated_tokens: choice.trailing_without_text,
            ..ChoiceSeam::default()
        },
        continues_message: false,
        repeated: choice.counted_without_text(),
    };
    match &mut continued.input {
        Some(Input::Prompt(prompt)) => prompt.push_str(&choice.text),
        Some(Input::Chat(chat)) => {
            // Many chat templates remove white space at the end of a message, so the engine must generate it again.
            let kept = choice.text.trim_end();
            if kept.len() < choice.text.len() {
                continued.seam.repeated_from = Some(kept.len());
                continued.repeated = choice.trailing_white_space;
            }
            if !kept.is_empty() {
                continued.continues_message = true;
                chat.messages.push(v1::ChatMessage {
                    role: "assistant".to_owned(),
                    content: kept.to_owned(),
                    ..v1::ChatMessage::default()
                });
            }
        }
        Some(Input::PromptTokenIds(_)) | None => {}
    }
    continued
}

#[cfg(test)]
mod tests;
