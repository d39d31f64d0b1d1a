//! The body of `/v1/chat/completions`.

use utoipa::ToSchema;

use super::tools::ToolFields;
use crate::error::Error;
use crate::gateway::dialect::{ParsedBody, ResponseOptions};
use crate::gateway::field_names::FieldNames;
use crate::gateway::fields::{Fields, Unsupported};
use crate::gateway::openai::message::Message;
use crate::gateway::openai::shared_fields::{SharedFields, check_choices, messages};
use crate::gateway::openai::stream_options::StreamOptions;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::MAX_LOGPROBS;

#[cfg(test)]
mod tests;

/// Names of the fields that the engine calls otherwise.
const FIELD_NAMES: FieldNames = FieldNames::new(&[("chat", "messages"), ("prompt", "messages")]);

/// Names if the client sets `max_completion_tokens` instead of `max_tokens`.
const NEWER_FIELD_NAMES: FieldNames = FieldNames::new(&[
    ("chat", "messages"),
    ("prompt", "messages"),
    ("max_tokens", "max_completion_tokens"),
]);

/// Body of a chat completion request.
#[derive(Debug, ToSchema)]
pub(super) struct ChatBody {
    /// The conversation so far, oldest message first.
    #[schema(value_type = Vec<Message>, min_items = 1)]
    messages: v1::Chat,
    /// Maximum number of tokens to generate per choice. Default: the rest of the model's context.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// Older name of `max_completion_tokens`. If both are set, they must be equal.
    #[schema(minimum = 1)]
    max_tokens: Option<u32>,
    /// Returns each token's log probability.
    #[schema(default = false)]
    logprobs: Option<bool>,
    /// Also returns the log probabilities of this many of the most likely tokens at each position. Only allowed with
    /// `logprobs: true`.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    #[schema(ignore)]
    tool_fields: ToolFields,
    #[schema(ignore)]
    shared_fields: SharedFields,
}

impl ChatBody {
    /// OpenAI and vLLM chat fields that this server does not support.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[
        ("functions", "[[]]"),
        ("function_call", r#"["none", "auto"]"#),
        ("modalities", r#"[["text"]]"#),
        ("prediction", "[]"),
        ("audio", "[]"),
        ("web_search_options", "[]"),
        ("verbosity", r#"["medium"]"#),
        ("echo", "[false]"),
        ("add_generation_prompt", "[true]"),
        ("continue_final_message", "[false]"),
    ];

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
            messages: Message::read_all(fields, "messages")?,
            max_completion_tokens: fields.take_integer("max_completion_tokens")?,
            max_tokens: fields.take_integer("max_tokens")?,
            logprobs: fields.take_bool("logprobs")?,
            top_logprobs: fields.take_integer("top_logprobs")?,
            tool_fields: ToolFields::read(fields)?,
            shared_fields: SharedFields::read(fields)?,
        })
    }

    fn into_parsed(self) -> Result<ParsedBody<StreamOptions>, Error> {
        let logprobs = self.top_logprobs()?;
        if let (Some(older), Some(limit)) = (self.max_tokens, self.max_completion_tokens)
            && older != limit
        {
            let message = format!(
                "max_tokens and max_completion_tokens must be equal if both are set \
                 (got {older} and {limit})."
            );
            return Err(Error::invalid_value("max_tokens", message));
        }
        for (name, limit) in [
            ("max_tokens", self.max_tokens),
            ("max_completion_tokens", self.max_completion_tokens),
        ] {
            if limit == Some(0) {
                return Err(Error::invalid_value(
                    name,
                    format!("{name} must be at least 1 (got 0)."),
                ));
            }
        }
        let names = match self.max_completion_tokens {
            Some(_) => NEWER_FIELD_NAMES,
            None => FIELD_NAMES,
        };
        let stream = self.shared_fields.stream();
        let n = self.shared_fields.n.unwrap_or(1);
        check_choices(1, n, "n")?;
        let mut message = v1::CompletionRequest {
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            logprobs,
            ..self.shared_fields.message()
        };
        self.tool_fields.write_to(&mut message);
        Ok(ParsedBody {
            messages: messages(vec![Input::Chat(self.messages)], &message),
            candidates: n,
            response: ResponseOptions {
                choices: n,
                logprobs,
            },
            stream,
            names,
        })
    }

    fn top_logprobs(&self) -> Result<Option<u32>, Error> {
        let message = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, Some(top)) if top > MAX_LOGPROBS => {
                format!("top_logprobs must be from 0 to {MAX_LOGPROBS} (got {top}).")
            }
            (true, top) => return Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => return Ok(None),
            (false, Some(_)) => "top_logprobs is only allowed with logprobs: true.".to_owned(),
        };
        Err(Error::invalid_value("top_logprobs", message))
    }
}
