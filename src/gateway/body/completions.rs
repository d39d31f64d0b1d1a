//! The body of `/v1/completions`.

use serde_json::Value;
use utoipa::ToSchema;

use super::shared_fields::SharedFields;
use super::{ParsedBody, ResponseOptions, Route, check_choices, messages, schema};
use crate::error::{Error, ErrorKind};
use crate::gateway::MAX_BODY_BYTES;
use crate::gateway::error_response::FieldNames;
use crate::gateway::fields::{Fields, json_type_name};
use crate::gateway::size;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;

/// The most of the likeliest tokens that a completion shows at each position, as with OpenAI.
pub(super) const MAX_LOGPROBS: u32 = 5;

/// The most candidates of which the best are shown, as with OpenAI.
const MAX_BEST_OF: u32 = 20;

/// What to complete, and how.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct CompletionsBody {
    /// What to complete: text, or token ids; or a list of either.
    #[schema(schema_with = schema::prompt, required)]
    prompt: Vec<Input>,
    /// Text that follows what is to be generated. Only with a prompt that is text, and only for models with
    /// fill-in-the-middle tokens.
    suffix: Option<String>,
    /// The most tokens to generate for each choice; 0 only with `echo`. The prompt and these together must
    /// fit into the model's context.
    #[schema(default = 16)]
    max_tokens: Option<u32>,
    /// How many candidates to generate for each prompt, of which the `n` with the highest log probability per
    /// token are shown. At least `n`, and at most 20 where it is more than `n`; more than `n` only without
    /// `stream`. Prompts times candidates are at most 128. The usage counts all of them.
    #[schema(minimum = 1, maximum = 128)]
    best_of: Option<u32>,
    /// Shows each token's log probability, and those of this many of the likeliest tokens at its position.
    #[schema(schema_with = schema::logprobs, required = false)]
    logprobs: Option<u32>,
    /// Whether each choice begins with the prompt.
    #[schema(default = false)]
    echo: Option<bool>,
    #[schema(ignore)]
    shared_fields: SharedFields,
}

impl CompletionsBody {
    /// Reads a body.
    ///
    /// # Errors
    /// Names the first field that is at fault.
    pub(in crate::gateway) fn parse(fields: &mut Fields) -> Result<ParsedBody, Error> {
        let body = Self::read(fields)?;
        fields.finish()?;
        body.asked()
    }

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        Ok(Self {
            prompt: prompts(fields)?,
            suffix: fields.string("suffix")?,
            max_tokens: fields.integer("max_tokens")?,
            best_of: fields.integer("best_of")?,
            logprobs: logprobs(fields)?,
            echo: fields.bool("echo")?,
            shared_fields: SharedFields::read(fields)?,
        })
    }

    fn asked(self) -> Result<ParsedBody, Error> {
        let prompts = self.prompt.len();
        let stream = self.shared_fields.stream();
        let n = self.shared_fields.n.unwrap_or(1);
        let candidates = self.best_of.unwrap_or(n);
        if self.logprobs.is_some_and(|top| top > MAX_LOGPROBS) {
            let message = format!("logprobs must be from 0 to {MAX_LOGPROBS}.");
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
            // Candidates are ranked by their log probabilities.
            logprobs: self.logprobs.or(is_ranked.then_some(0)),
            echo: self.echo.unwrap_or(false),
            n: Some(candidates),
            ..self.shared_fields.message()
        };
        Ok(ParsedBody {
            messages: messages(self.prompt, &message),
            candidates,
            shown: ResponseOptions {
                choices: n,
                logprobs: self.logprobs,
            },
            stream,
            names: if self.logprobs.is_none() && is_ranked {
                FieldNames::of(Route::Completions).with_best_of()
            } else {
                FieldNames::of(Route::Completions)
            },
        })
    }
}

fn check_best_of(best_of: u32, n: u32, is_stream: bool) -> Result<(), Error> {
    let message = if !(1..=MAX_BEST_OF).contains(&best_of) && best_of != n {
        format!("best_of must be from 1 to {MAX_BEST_OF}.")
    } else if best_of < n {
        "best_of must be at least n.".to_owned()
    } else if best_of > n && is_stream {
        "best_of cannot be streamed: which choices are the best is known at their end.".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::invalid_value("best_of", message))
}

/// Each prompt's message has a copy of the suffix.
fn check_suffix(suffix: Option<&str>, prompts: usize) -> Result<(), Error> {
    let copies = suffix.map_or(0, str::len).saturating_mul(prompts);
    if copies <= MAX_BODY_BYTES {
        return Ok(());
    }
    let message = "suffix is too long for so many prompts.";
    Err(Error::invalid_value("suffix", message))
}

/// Each choice repeats its prompt, and tells the log probabilities of each of its tokens: an answer must
/// not be larger by far than what was asked. Here what is certain is looked at; how many tokens a text has, the
/// engine says.
fn check_echo(prompts: &[Input], choices: u32, logprobs: Option<u32>) -> Result<(), Error> {
    let top = logprobs.map(|top| usize::try_from(top).unwrap_or(usize::MAX));
    let size = |prompt: &Input| match prompt {
        Input::Prompt(text) => size::of_text(text),
        Input::PromptTokenIds(ids) => top.map_or(0, |top| size::of_logprobs(ids.ids.len(), top)),
        Input::Chat(_) => 0,
    };
    let of_all = prompts.iter().map(size).sum::<usize>();
    let choices = usize::try_from(choices).unwrap_or(usize::MAX);
    size::check_echo(of_all.saturating_mul(choices))
}

/// How many of the likeliest tokens to show. `false`, which chats have in this place, asks for none.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Error> {
    const NAME: &str = "logprobs";
    match fields.take(NAME) {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(value) => fields.whole(NAME, &value).map(Some),
    }
}

/// The prompts, in any of OpenAI's four forms.
fn prompts(fields: &mut Fields) -> Result<Vec<Input>, Error> {
    match fields.required("prompt")? {
        Value::String(text) => Ok(vec![Input::Prompt(text)]),
        Value::Array(items) => match items.first() {
            None => Err(Error::invalid_value(
                "prompt",
                "prompt must not be an empty list.",
            )),
            Some(Value::Number(_)) => Ok(vec![token_ids(fields, &items)?]),
            Some(first) => {
                let kind = std::mem::discriminant(first);
                let odd = items
                    .iter()
                    .find(|item| std::mem::discriminant(*item) != kind);
                match odd {
                    None => items
                        .into_iter()
                        .map(|item| one_of_many(fields, item))
                        .collect(),
                    Some(odd) => Err(wrong_prompt(odd)),
                }
            }
        },
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_prompt(&other))
        }
    }
}

fn one_of_many(fields: &Fields, item: Value) -> Result<Input, Error> {
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
            "prompt must not hold an empty list.",
        ));
    }
    let id = |item: &Value| match item {
        Value::Number(_) => fields.whole("prompt", item),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => {
            Err(wrong_prompt(item))
        }
    };
    let ids: Result<Vec<_>, _> = items.iter().map(id).collect();
    Ok(Input::PromptTokenIds(v1::TokenIds { ids: ids? }))
}

fn wrong_prompt(value: &Value) -> Error {
    let message = format!(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists; \
         it holds {}.",
        json_type_name(value)
    );
    Error::new(ErrorKind::InvalidType, message).with_param("prompt")
}
