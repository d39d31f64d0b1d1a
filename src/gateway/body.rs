//! The bodies of requests as the engine's messages. What a body may hold is said by its struct, from which
//! the API's description is made; it is filled field by field, so that an error names the one at fault.

use utoipa::ToSchema;

use super::error_response::FieldNames;
use super::fields::{Fields, Unsupported};
use crate::error::Error;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::MAX_CHOICES;

pub(super) mod chat;
pub(super) mod completions;
pub(super) mod message;
pub(super) mod schema;
pub(super) mod shared_fields;
#[cfg(test)]
mod tests;
pub(super) mod tokenize;

/// Which of OpenAI's two kinds of completion a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// What a body asks for.
#[derive(Debug)]
pub(super) struct ParsedBody {
    /// One message for each prompt.
    pub(super) messages: Vec<v1::CompletionRequest>,
    /// How many choices the engine makes of each prompt.
    pub(super) candidates: u32,
    /// What is shown of them.
    pub(super) shown: ResponseOptions,
    /// Whether the answer is a stream, and what it holds besides the text.
    pub(super) stream: Option<StreamOptions>,
    /// How the client knows the engine's fields.
    pub(super) names: FieldNames,
}

/// What an answer shows of the choices that the engine made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseOptions {
    /// How many of each prompt's choices: the likeliest, where more were made.
    pub(super) choices: u32,
    /// How many of the likeliest tokens at each position; `None` for no log probabilities.
    pub(super) logprobs: Option<u32>,
}

/// What a stream holds besides the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ToSchema)]
pub struct StreamOptions {
    /// Whether a last object has the usage, and no choices.
    #[schema(required = false, nullable, default = false)]
    pub include_usage: bool,
    /// Whether every line has the usage so far.
    #[schema(required = false, nullable, default = false)]
    pub continuous_usage_stats: bool,
    /// Whether every line has its token's deadline and emission, in nanoseconds of CLOCK_MONOTONIC.
    #[schema(required = false, nullable, default = false)]
    pub include_stamps: bool,
    /// Whether a last object tells what the request took.
    #[schema(required = false, nullable, default = false)]
    pub include_timings: bool,
    /// Whether every line has its token's id.
    #[schema(required = false, nullable, default = false)]
    pub return_token_ids: bool,
}

impl StreamOptions {
    /// What OpenAI has and this server does not.
    pub(super) const UNSUPPORTED: &[Unsupported] = &[("include_obfuscation", "[true, false]")];

    pub(super) fn read(fields: &mut Fields) -> Result<Self, Error> {
        let mut flag = |name| Ok::<_, Error>(fields.bool(name)?.unwrap_or(false));
        let options = Self {
            include_usage: flag("include_usage")?,
            continuous_usage_stats: flag("continuous_usage_stats")?,
            include_stamps: flag("include_stamps")?,
            include_timings: flag("include_timings")?,
            return_token_ids: flag("return_token_ids")?,
        };
        fields.refuse(Self::UNSUPPORTED)?;
        Ok(options)
    }
}

/// The engine's messages, one for each prompt.
fn messages(prompts: Vec<Input>, message: &v1::CompletionRequest) -> Vec<v1::CompletionRequest> {
    let with_prompt = |input| v1::CompletionRequest {
        input: Some(input),
        ..message.clone()
    };
    prompts.into_iter().map(with_prompt).collect()
}

/// Whether so many choices of so many prompts are not too many. `param` is the field that says how many
/// choices, where it is not the prompts alone that are too many.
fn check_choices(prompts: usize, choices_per_prompt: u32, param: &str) -> Result<(), Error> {
    let choices = u32::try_from(prompts)
        .ok()
        .and_then(|prompts| prompts.checked_mul(choices_per_prompt));
    if choices.is_some_and(|choices| choices <= MAX_CHOICES) {
        return Ok(());
    }
    let (param, message) = if choices_per_prompt <= 1 {
        let message = format!("prompt must hold at most {MAX_CHOICES} prompts.");
        ("prompt", message)
    } else {
        let message = format!("The number of prompts times {param} must be at most {MAX_CHOICES}.");
        (param, message)
    };
    Err(Error::invalid_value(param, message))
}
