//! The body of `/v1/completions`.

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::{Error, ErrorKind};
use crate::gateway::body_schema::null_schema;
use crate::gateway::buffered_request::MAX_BODY_BYTES;
use crate::gateway::dialect::{ParsedBody, ResponseOptions};
use crate::gateway::field_names::FieldNames;
use crate::gateway::fields::{Fields, Unsupported};
use crate::gateway::json_object::json_type_name;
use crate::gateway::openai::shared_fields::{SharedFields, check_choices, messages};
use crate::gateway::openai::stream_options::StreamOptions;
use crate::gateway::response_size;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;

#[cfg(test)]
mod tests;

/// Largest `logprobs`, as in OpenAI's API.
const MAX_LOGPROBS: u32 = 5;

/// Largest `best_of`, as in OpenAI's API.
const MAX_BEST_OF: u32 = 20;

/// Names of the fields that the engine calls otherwise.
const FIELD_NAMES: FieldNames = FieldNames::new(&[("prompt_token_ids", "prompt")]);

/// Field names if the client sets `best_of` but not `logprobs`. `best_of` requests log probabilities from the engine,
/// so errors about them must name `best_of`.
const RANKED_FIELD_NAMES: FieldNames =
    FieldNames::new(&[("prompt_token_ids", "prompt"), ("logprobs", "best_of")]);

/// Body of a completion request.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct CompletionsBody {
    /// One or more prompts, each a string or a list of token ids.
    #[schema(schema_with = prompt_schema, required)]
    prompt: Vec<Input>,
    /// Text after the completion, for fill-in-the-middle. Requires a text prompt and a model with
    /// fill-in-the-middle tokens.
    suffix: Option<String>,
    /// Maximum number of tokens to generate per choice; 0 is only allowed with `echo`. The prompt and
    /// `max_tokens` together must fit into the model's context.
    #[schema(default = 16)]
    max_tokens: Option<u32>,
    /// Number of candidates to generate per prompt. The response has the `n` candidates with the highest log
    /// probability per token. Must be at least `n`; above `n` it is at most 20 and cannot be streamed. Prompts
    /// times candidates must be at most 128. The usage counts every candidate.
    #[schema(minimum = 1, maximum = 128)]
    best_of: Option<u32>,
    /// Returns each token's log probability, and those of this many of the most likely tokens at its position.
    #[schema(schema_with = logprobs_schema, required = false)]
    logprobs: Option<u32>,
    /// Returns the prompt before each choice.
    #[schema(default = false)]
    echo: Option<bool>,
    #[schema(ignore)]
    shared_fields: SharedFields,
}

impl CompletionsBody {
    /// OpenAI's chat fields that have a value without an effect.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] =
        &[("response_format", r#"[{"type": "text"}]"#)];

    /// Reads a body.
    ///
    /// # Errors
    /// An error that names the first invalid field.
    pub(in crate::gateway) fn parse(
        fields: &mut Fields,
    ) -> Result<ParsedBody<StreamOptions>, Error> {
        let body = Self::read(fields)?;
        fields.finish()?;
        body.into_parsed()
    }

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        Ok(Self {
            prompt: prompts(fields)?,
            suffix: fields.take_string("suffix")?,
            max_tokens: fields.take_integer("max_tokens")?,
            best_of: fields.take_integer("best_of")?,
            logprobs: logprobs(fields)?,
            echo: fields.take_bool("echo")?,
            shared_fields: SharedFields::read(fields)?,
        })
    }

    fn into_parsed(self) -> Result<ParsedBody<StreamOptions>, Error> {
        let prompts = self.prompt.len();
        let stream = self.shared_fields.stream();
        let n = self.shared_fields.n.unwrap_or(1);
        let candidates = self.best_of.unwrap_or(n);
        if let Some(top) = self.logprobs
            && top > MAX_LOGPROBS
        {
            let message = format!("logprobs must be from 0 to {MAX_LOGPROBS} (got {top}).");
            return Err(Error::invalid_value("logprobs", message));
        }
        if let Some(best_of) = self.best_of {
            check_best_of(best_of, n, stream.is_some())?;
        }
        let is_ranked = candidates > n;
        check_choices(prompts, candidates, if is_ranked { "best_of" } else { "n" })?;
        check_suffix(self.suffix.as_deref(), prompts)?;
        if self.echo.unwrap_or(false) {
            check_echo(&self.prompt, candidates, self.logprobs)?;
        }
        let message = v1::CompletionRequest {
            suffix: self.suffix,
            max_tokens: self.max_tokens,
            // The candidates are ranked by their log probabilities.
            logprobs: self.logprobs.or(is_ranked.then_some(0)),
            echo: self.echo.unwrap_or(false),
            n: Some(candidates),
            ..self.shared_fields.message()
        };
        Ok(ParsedBody {
            messages: messages(self.prompt, &message),
            candidates,
            response: ResponseOptions {
                choices: n,
                logprobs: self.logprobs,
            },
            stream,
            names: if self.logprobs.is_none() && is_ranked {
                RANKED_FIELD_NAMES
            } else {
                FIELD_NAMES
            },
        })
    }
}

fn check_best_of(best_of: u32, n: u32, is_stream: bool) -> Result<(), Error> {
    let message = if !(1..=MAX_BEST_OF).contains(&best_of) && best_of != n {
        format!("best_of must be from 1 to {MAX_BEST_OF} (got {best_of}).")
    } else if best_of < n {
        format!("best_of must be at least n, which is {n} (got {best_of}).")
    } else if best_of > n && is_stream {
        "best_of above n cannot be streamed. Set stream to false, or best_of to n.".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::invalid_value("best_of", message))
}

/// Checks the size of the suffix, which is copied into the message of each prompt.
fn check_suffix(suffix: Option<&str>, prompts: usize) -> Result<(), Error> {
    let copies = suffix.map_or(0, str::len).saturating_mul(prompts);
    if copies <= MAX_BODY_BYTES {
        return Ok(());
    }
    let message = "suffix is too long for this many prompts. Shorten it, or send fewer prompts.";
    Err(Error::invalid_value("suffix", message))
}

/// Rejects an echo whose response would be far larger than its request. Each choice repeats its prompt, with the log
/// probabilities of each prompt token if requested. The number of tokens in a text prompt is not known yet, so this
/// check uses a lower bound.
fn check_echo(prompts: &[Input], choices: u32, logprobs: Option<u32>) -> Result<(), Error> {
    let top = logprobs.map(|top| usize::try_from(top).unwrap_or(usize::MAX));
    let size = |prompt: &Input| match prompt {
        Input::Prompt(text) => response_size::text_size(text),
        Input::PromptTokenIds(ids) => {
            top.map_or(0, |top| response_size::logprobs_size(ids.ids.len(), top))
        }
        Input::Chat(_) => 0,
    };
    let total = prompts.iter().map(size).sum::<usize>();
    let choices = usize::try_from(choices).unwrap_or(usize::MAX);
    response_size::check_echo(total.saturating_mul(choices))
}

/// Reads `logprobs`. `false` means no log probabilities: it is the default of the chat field with the same name.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Error> {
    const NAME: &str = "logprobs";
    match fields.take(NAME) {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(value) => fields.integer_value(NAME, &value).map(Some),
    }
}

/// Reads `prompt`: a string, a list of strings, a list of token ids, or a list of lists of token ids.
fn prompts(fields: &mut Fields) -> Result<Vec<Input>, Error> {
    match fields.take_required("prompt")? {
        Value::String(text) => Ok(vec![Input::Prompt(text)]),
        Value::Array(items) => match items.first() {
            None => Err(Error::invalid_value(
                "prompt",
                "prompt must not be an empty list.",
            )),
            Some(Value::Number(_)) => Ok(vec![token_ids(fields, &items)?]),
            Some(first) => {
                let kind = std::mem::discriminant(first);
                let mismatch = items
                    .iter()
                    .find(|item| std::mem::discriminant(*item) != kind);
                match mismatch {
                    None => items
                        .into_iter()
                        .map(|item| list_item(fields, item))
                        .collect(),
                    Some(item) => Err(wrong_prompt(item)),
                }
            }
        },
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_prompt(&other))
        }
    }
}

fn list_item(fields: &Fields, item: Value) -> Result<Input, Error> {
    match item {
        Value::String(text) => Ok(Input::Prompt(text)),
        Value::Array(ids) => token_ids(fields, &ids),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            Err(wrong_prompt(&item))
        }
    }
}

fn token_ids(fields: &Fields, items: &[Value]) -> Result<Input, Error> {
    if items.is_empty() {
        return Err(Error::invalid_value(
            "prompt",
            "prompt must not contain an empty list.",
        ));
    }
    let id = |item: &Value| match item {
        Value::Number(_) => fields.integer_value("prompt", item),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            Err(wrong_prompt(item))
        }
    };
    let ids: Result<Vec<_>, _> = items.iter().map(id).collect();
    Ok(Input::PromptTokenIds(v1::TokenIds { ids: ids? }))
}

fn wrong_prompt(value: &Value) -> Error {
    let message = format!(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of token \
         ids (found {}).",
        json_type_name(value)
    );
    Error::new(ErrorKind::InvalidType, message).with_param("prompt")
}

fn prompt_schema() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let ids = || ArrayBuilder::new().items(token_id()).min_items(Some(1));
    let many = || ArrayBuilder::new().min_items(Some(1)).max_items(Some(128));
    AnyOfBuilder::new()
        .description(Some(
            "One or more prompts, each a string or a list of token ids.",
        ))
        .item(text())
        .item(ids())
        .item(many().items(text()))
        .item(many().items(ids()))
        .into()
}

fn logprobs_schema() -> RefOr<Schema> {
    let count = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(0))
        .maximum(Some(MAX_LOGPROBS));
    let none = ObjectBuilder::new()
        .schema_type(Type::Boolean)
        .enum_values(Some([false]));
    AnyOfBuilder::new()
        .description(Some(
            "Returns each token's log probability, and those of this many of the most likely tokens at its \
             position. `false` means none.",
        ))
        .item(count)
        .item(none)
        .item(null_schema())
        .into()
}

fn token_id() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(0))
        .maximum(Some(u32::MAX))
}
