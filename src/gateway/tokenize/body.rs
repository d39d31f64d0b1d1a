//! Bodies of `/tokenize` and `/detokenize`, compatible with vLLM.

use utoipa::openapi::schema::{OneOfBuilder, Schema};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use crate::error::{Error, ErrorKind};
use crate::gateway::field_names::FieldNames;
use crate::gateway::fields::{Fields, Unsupported};
use crate::gateway::openai::message::Message;
use crate::proto::v1;
use crate::proto::v1::tokenize_request::Input;
use crate::request::TokenId;

#[cfg(test)]
mod tests;

/// Client's names of fields of `/tokenize` for which the engine has other names, for text and for chats.
pub(in crate::gateway) const TOKENIZE_NAMES: FieldNames =
    FieldNames::new(&[("text", "prompt"), ("chat", "messages")]);

/// Client's names of fields of `/detokenize` for which the engine has other names.
pub(in crate::gateway) const DETOKENIZE_NAMES: FieldNames =
    FieldNames::new(&[("token_ids", "tokens")]);

/// Body of a tokenize request.
pub(in crate::gateway) enum TokenizeBody {
    Text(TokenizeText),
    Chat(TokenizeChat),
}

/// Text to tokenize.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct TokenizeText {
    /// Model name. Optional if the server has only one model.
    #[schema(max_length = 256)]
    model: Option<String>,
    /// The text to tokenize.
    prompt: String,
    /// Adds the model's beginning-of-sequence token, if it has one.
    #[schema(default = true)]
    add_special_tokens: Option<bool>,
}

/// Conversation to render with the model's chat template and tokenize.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct TokenizeChat {
    /// Model name. Optional if the server has only one model.
    #[schema(max_length = 256)]
    model: Option<String>,
    /// Messages, oldest first.
    #[schema(value_type = Vec<Message>, min_items = 1)]
    messages: v1::Chat,
    /// Adds the model's beginning-of-sequence token, if it has one.
    #[schema(default = true)]
    add_special_tokens: Option<bool>,
}

/// Token ids to convert to text.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct DetokenizeBody {
    /// Model name. Optional if the server has only one model.
    #[schema(max_length = 256)]
    model: Option<String>,
    /// Token ids.
    tokens: Vec<TokenId>,
}

impl PartialSchema for TokenizeBody {
    fn schema() -> RefOr<Schema> {
        OneOfBuilder::new()
            .item(Ref::from_schema_name("TokenizeText"))
            .item(Ref::from_schema_name("TokenizeChat"))
            .into()
    }
}

impl ToSchema for TokenizeBody {}

impl TokenizeText {
    /// vLLM fields that this server does not support.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[("return_token_strs", "[false]")];

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        let prompt = fields.take_required("prompt")?;
        Ok(Self {
            model: fields.take_string("model")?,
            prompt: fields.string_value("prompt", prompt)?,
            add_special_tokens: fields.take_bool("add_special_tokens")?,
        })
    }
}

impl TokenizeChat {
    /// vLLM fields that this server does not support.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[
        ("return_token_strs", "[false]"),
        ("add_generation_prompt", "[true]"),
        ("continue_final_message", "[false]"),
    ];

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        Ok(Self {
            model: fields.take_string("model")?,
            messages: Message::read_all(fields, "messages")?,
            add_special_tokens: fields.take_bool("add_special_tokens")?,
        })
    }
}

impl TokenizeBody {
    /// Reads a body.
    ///
    /// # Errors
    /// An error that names the first invalid field.
    pub(in crate::gateway) fn parse(fields: &mut Fields) -> Result<v1::TokenizeRequest, Error> {
        let body = match (fields.contains("prompt"), fields.contains("messages")) {
            (true, false) => Self::Text(TokenizeText::read(fields)?),
            (false, true) => Self::Chat(TokenizeChat::read(fields)?),
            (true, true) => {
                let message = "prompt and messages cannot be used together. Send one of them.";
                return Err(Error::invalid_value("prompt", message));
            }
            (false, false) => {
                let message = "One of prompt and messages is required.";
                let error = Error::new(ErrorKind::MissingParameter, message);
                return Err(error.with_param("prompt"));
            }
        };
        fields.finish()?;
        Ok(body.into())
    }
}

impl From<TokenizeBody> for v1::TokenizeRequest {
    fn from(body: TokenizeBody) -> Self {
        let (model, input, add_special_tokens) = match body {
            TokenizeBody::Text(body) => (
                body.model,
                Input::Text(body.prompt),
                body.add_special_tokens,
            ),
            TokenizeBody::Chat(body) => (
                body.model,
                Input::Chat(body.messages),
                body.add_special_tokens,
            ),
        };
        Self {
            model: model.unwrap_or_default(),
            input: Some(input),
            add_special_tokens,
        }
    }
}

impl DetokenizeBody {
    /// Reads a body.
    ///
    /// # Errors
    /// An error that names the first invalid field.
    pub(in crate::gateway) fn parse(fields: &mut Fields) -> Result<v1::DetokenizeRequest, Error> {
        let body = Self::read(fields)?;
        fields.finish()?;
        Ok(v1::DetokenizeRequest {
            model: body.model.unwrap_or_default(),
            token_ids: body.tokens,
        })
    }

    pub(in crate::gateway) fn read(fields: &mut Fields) -> Result<Self, Error> {
        const NAME: &str = "tokens";
        let ids = fields.take_required_list(NAME, "a list of token ids")?;
        let ids: Result<_, Error> = ids
            .iter()
            .map(|id| fields.integer_value(NAME, id))
            .collect();
        Ok(Self {
            model: fields.take_string("model")?,
            tokens: ids?,
        })
    }
}
