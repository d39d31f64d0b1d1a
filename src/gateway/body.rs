//! Request bodies, parsed and converted to the engine's protobuf messages.
//!
//! Each body is a struct, and the OpenAPI description is derived from it. A body is read field by field, so
//! an error names the field that is wrong.

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

/// An OpenAI completion endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// A completion request, parsed from its body.
#[derive(Debug)]
pub(super) struct ParsedBody {
    /// One engine request per prompt.
    pub(super) messages: Vec<v1::CompletionRequest>,
    /// Choices that the engine generates per prompt. More than `n` with `best_of`.
    pub(super) candidates: u32,
    pub(super) response: ResponseOptions,
    /// Options of a streamed response; `None` if the response is not streamed.
    pub(super) stream: Option<StreamOptions>,
    /// Maps field names in engine errors to this endpoint's field names.
    pub(super) names: FieldNames,
}

/// Number of choices and log probabilities in the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseOptions {
    /// Choices to return per prompt. If the engine generated more, the likeliest are returned.
    pub(super) choices: u32,
    /// Top log probabilities to return per token; `None` for no log probabilities.
    pub(super) logprobs: Option<u32>,
}

/// Extra data in a stream besides the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ToSchema)]
pub struct StreamOptions {
    /// Sends a final object with the usage and no choices.
    #[schema(required = false, nullable, default = false)]
    pub include_usage: bool,
    /// Adds the usage so far to every line.
    #[schema(required = false, nullable, default = false)]
    pub continuous_usage_stats: bool,
    /// Adds to every line when its token was scheduled (only by a runner with a schedule) and when it was emitted, in
    /// nanoseconds of CLOCK_MONOTONIC.
    #[schema(required = false, nullable, default = false)]
    pub include_stamps: bool,
    /// Sends a final object with the request's timings.
    #[schema(required = false, nullable, default = false)]
    pub include_timings: bool,
    /// Adds the token id to every line.
    #[schema(required = false, nullable, default = false)]
    pub return_token_ids: bool,
}

impl StreamOptions {
    /// OpenAI fields that this server does not support.
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
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        Ok(options)
    }
}

/// Copies `message` once per prompt.
fn messages(prompts: Vec<Input>, message: &v1::CompletionRequest) -> Vec<v1::CompletionRequest> {
    let with_prompt = |input| v1::CompletionRequest {
        input: Some(input),
        ..message.clone()
    };
    prompts.into_iter().map(with_prompt).collect()
}

/// Rejects a request for more than [`MAX_CHOICES`] choices in total. The error names `param`, the field that set
/// the choices per prompt, or `prompt` if there are too many prompts for one choice each.
fn check_choices(prompts: usize, choices_per_prompt: u32, param: &str) -> Result<(), Error> {
    let choices = u32::try_from(prompts)
        .ok()
        .and_then(|prompts| prompts.checked_mul(choices_per_prompt));
    if choices.is_some_and(|choices| choices <= MAX_CHOICES) {
        return Ok(());
    }
    let (param, message) = if choices_per_prompt <= 1 {
        let message = format!("prompt must have at most {MAX_CHOICES} prompts (got {prompts}).");
        ("prompt", message)
    } else {
        let message = format!(
            "The number of prompts times {param} must be at most {MAX_CHOICES} \
             (got {prompts} times {choices_per_prompt})."
        );
        (param, message)
    };
    Err(Error::invalid_value(param, message))
}
