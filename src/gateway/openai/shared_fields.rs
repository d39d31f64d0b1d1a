//! Request fields that `/v1/completions` and `/v1/chat/completions` share.

use std::collections::HashMap;

use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use super::stream_options::StreamOptions;
use crate::error::Error;
use crate::gateway::body_schema::null_schema;
use crate::gateway::fields::{Fields, Unsupported};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::{
    MAX_CACHE_SALT_BYTES, MAX_CHOICES, MAX_LOGIT_BIASES, MAX_MODEL_NAME_BYTES, MAX_STOP_BYTES,
    MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_USER_BYTES, TokenId,
};

/// Sampling and response options.
#[derive(Debug, ToSchema)]
pub(super) struct SharedFields {
    /// Model name. Optional if the server has only one model.
    #[schema(max_length = 256)]
    pub(super) model: Option<String>,
    /// Number of choices to generate per prompt. Prompts times choices must be at most 128.
    #[schema(minimum = 1, maximum = 128, default = 1)]
    pub(super) n: Option<u32>,
    /// Sampling temperature. At 0 the most likely token is always chosen.
    #[schema(minimum = 0, maximum = 2, default = 1)]
    pub(super) temperature: Option<f32>,
    /// Samples only from the most likely tokens whose probabilities add up to this value.
    #[schema(minimum = 0, maximum = 1, default = 1)]
    pub(super) top_p: Option<f32>,
    /// Samples only from this many of the most likely tokens; 0 or -1 means all.
    #[schema(minimum = -1, default = 0)]
    pub(super) top_k: Option<i32>,
    /// Samples only from tokens whose probability is at least this fraction of the most likely token's.
    #[schema(minimum = 0, maximum = 1, default = 0)]
    pub(super) min_p: Option<f32>,
    /// Subtracted from the logit of each token that the completion already contains.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub(super) presence_penalty: Option<f32>,
    /// Subtracted from a token's logit once for each time the completion already contains the token.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub(super) frequency_penalty: Option<f32>,
    /// Makes tokens of the prompt and the completion less likely if above 1, more likely if below.
    #[schema(exclusive_minimum = 0, maximum = 2, default = 1)]
    pub(super) repetition_penalty: Option<f32>,
    /// Values to add to token logits before sampling, by token id.
    #[schema(schema_with = logit_bias_schema, required = false)]
    pub(super) logit_bias: HashMap<TokenId, f32>,
    /// Sampling seed. The same seed, choice and position sample the same way. Random by default.
    pub(super) seed: Option<i64>,
    /// Up to 16 stop strings. A choice ends before the first match.
    #[schema(schema_with = stop_schema, required = false)]
    pub(super) stop: Vec<String>,
    /// Up to 128 token ids that end a choice.
    #[schema(max_items = 128, required = false, nullable)]
    pub(super) stop_token_ids: Vec<TokenId>,
    /// Includes the matched stop string or stop token in the text.
    #[schema(default = false)]
    pub(super) include_stop_str_in_output: Option<bool>,
    /// Minimum number of tokens per choice; at most `max_tokens`. Before that, no end-of-sequence token, stop
    /// string or stop token ends a choice.
    #[schema(default = 0)]
    pub(super) min_tokens: Option<u32>,
    /// Continues after the end-of-sequence token, as after any other token.
    #[schema(default = false)]
    pub(super) ignore_eos: Option<bool>,
    /// Queue priority. Lower values are scheduled first.
    #[schema(default = 0)]
    pub(super) priority: Option<i32>,
    /// Identifier of the end user, chosen by the client.
    #[schema(max_length = 512)]
    pub(super) user: Option<String>,
    /// Salt of the prefix cache. Prompts share computed tokens only if their salts are equal. With a secret salt, no
    /// other client can learn from response times whether a prompt was sent before.
    #[schema(max_length = 512)]
    pub(super) cache_salt: Option<String>,
    /// Streams tokens as they are generated.
    #[schema(default = false)]
    pub(super) stream: Option<bool>,
    /// Extra data in the stream. Only allowed with `stream: true`.
    pub(super) stream_options: Option<StreamOptions>,
}

impl SharedFields {
    /// Fields that are ignored after their type has been checked, with their descriptions.
    pub(super) const HINTS: [(&str, &str); 3] = [
        (
            "prompt_cache_key",
            "Accepted and ignored: a hint for OpenAI's prompt cache.",
        ),
        (
            "prompt_cache_retention",
            "Accepted and ignored: a hint for OpenAI's prompt cache.",
        ),
        (
            "safety_identifier",
            "Accepted and ignored: OpenAI's replacement for `user`.",
        ),
    ];

    /// OpenAI and vLLM fields that this server does not support.
    pub(super) const UNSUPPORTED: &[Unsupported] = &[
        ("store", "[false]"),
        ("metadata", "[{}]"),
        ("service_tier", r#"["auto", "default"]"#),
        ("skip_special_tokens", "[true]"),
        ("spaces_between_special_tokens", "[true]"),
        ("use_beam_search", "[false]"),
        ("length_penalty", "[1]"),
    ];

    pub(super) fn read(fields: &mut Fields) -> Result<Self, Error> {
        fields.reject_unsupported(Self::UNSUPPORTED)?;
        for (hint, _) in Self::HINTS {
            fields.take_string(hint)?;
        }
        let stream = fields.take_bool("stream")?;
        let read = Self {
            stream_options: stream_options(fields, stream.unwrap_or(false))?,
            stream,
            model: fields.take_string("model")?,
            n: fields.take_integer("n")?,
            temperature: fields.take_number("temperature")?,
            top_p: fields.take_number("top_p")?,
            top_k: fields.take_integer("top_k")?,
            min_p: fields.take_number("min_p")?,
            presence_penalty: fields.take_number("presence_penalty")?,
            frequency_penalty: fields.take_number("frequency_penalty")?,
            repetition_penalty: fields.take_number("repetition_penalty")?,
            logit_bias: logit_bias(fields)?,
            seed: fields.take_integer("seed")?,
            stop: stop(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            include_stop_str_in_output: fields.take_bool("include_stop_str_in_output")?,
            min_tokens: fields.take_integer("min_tokens")?,
            ignore_eos: fields.take_bool("ignore_eos")?,
            priority: fields.take_integer("priority")?,
            user: fields.take_string("user")?,
            cache_salt: fields.take_string("cache_salt")?,
        };
        if read.n == Some(0) {
            return Err(fields.invalid("n", "must be at least 1 (got 0)"));
        }
        read.check_sizes()?;
        Ok(read)
    }

    /// Returns an engine request with these fields. The caller sets all others.
    pub(super) fn message(self) -> v1::CompletionRequest {
        v1::CompletionRequest {
            include_stamps: self.stream().is_some_and(|stream| stream.include_stamps),
            model: self.model.unwrap_or_default(),
            n: self.n,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            logit_bias: self.logit_bias,
            seed: self.seed,
            stop: self.stop,
            stop_token_ids: self.stop_token_ids,
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            min_tokens: self.min_tokens.unwrap_or(0),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            priority: self.priority,
            user: self.user.unwrap_or_default(),
            cache_salt: self.cache_salt.unwrap_or_default(),
            ..v1::CompletionRequest::default()
        }
    }

    /// Returns the stream options, or `None` if the response is not streamed.
    pub(super) fn stream(&self) -> Option<StreamOptions> {
        let is_stream = self.stream.unwrap_or(false);
        is_stream.then(|| self.stream_options.unwrap_or_default())
    }

    /// Checks the size of the fields that are copied into the message of each prompt. The engine checks their values.
    fn check_sizes(&self) -> Result<(), Error> {
        let stop: usize = self.stop.iter().map(String::len).sum();
        let bytes = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        for (param, size, limit, unit) in [
            ("model", bytes(&self.model), MAX_MODEL_NAME_BYTES, "bytes"),
            ("stop", stop, MAX_STOP_STRINGS * MAX_STOP_BYTES, "bytes"),
            ("user", bytes(&self.user), MAX_USER_BYTES, "bytes"),
            (
                "cache_salt",
                bytes(&self.cache_salt),
                MAX_CACHE_SALT_BYTES,
                "bytes",
            ),
            (
                "logit_bias",
                self.logit_bias.len(),
                MAX_LOGIT_BIASES,
                "tokens",
            ),
            (
                "stop_token_ids",
                self.stop_token_ids.len(),
                MAX_STOP_TOKENS,
                "ids",
            ),
        ] {
            if size > limit {
                let text = format!("{param} must have at most {limit} {unit} (got {size}).");
                return Err(Error::invalid_value(param, text));
            }
        }
        Ok(())
    }
}

fn stream_options(fields: &mut Fields, is_stream: bool) -> Result<Option<StreamOptions>, Error> {
    let Some(mut options) = fields.take_object("stream_options")? else {
        return Ok(None);
    };
    if !is_stream && !options.is_empty() {
        let message = "stream_options is only allowed with stream: true.";
        return Err(Error::invalid_value("stream_options", message));
    }
    let known = StreamOptions::read(&mut options)?;
    fields.finish_nested(options)?;
    Ok(Some(known))
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, Error> {
    const EXPECTED: &str = "a string or a list of strings";
    let items = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    let text = |item| match item {
        Value::String(stop) => Ok(stop),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            Err(fields.wrong_type("stop", EXPECTED, &item))
        }
    };
    items.into_iter().map(text).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<TokenId>, Error> {
    const NAME: &str = "stop_token_ids";
    let ids = fields.take_list(NAME, "a list of token ids")?;
    let ids = ids.unwrap_or_default();
    ids.iter()
        .map(|id| fields.integer_value(NAME, id))
        .collect()
}

fn logit_bias(fields: &mut Fields) -> Result<HashMap<TokenId, f32>, Error> {
    const NAME: &str = "logit_bias";
    let Some(mut biases) = fields.take_object(NAME)? else {
        return Ok(HashMap::new());
    };
    let mut known = HashMap::new();
    for (id, bias) in biases.take_all() {
        let bias = biases.float_value(&id, &bias)?;
        // The keys `01` and `1` would be two keys for the same token.
        let token = id
            .parse()
            .ok()
            .filter(|token: &TokenId| token.to_string() == id);
        let token = token.ok_or_else(|| fields.invalid(NAME, "must have token ids as keys"))?;
        known.insert(token, bias);
    }
    Ok(known)
}

fn stop_schema() -> RefOr<Schema> {
    let text = || {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
            .max_length(Some(MAX_STOP_BYTES))
    };
    let many = ArrayBuilder::new()
        .items(text())
        .max_items(Some(MAX_STOP_STRINGS));
    AnyOfBuilder::new()
        .description(Some(
            "Up to 16 stop strings. A choice ends before the first match.",
        ))
        .item(text())
        .item(many)
        .item(null_schema())
        .into()
}

fn logit_bias_schema() -> RefOr<Schema> {
    let id = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^(0|[1-9][0-9]{0,8})$"));
    let bias = ObjectBuilder::new()
        .schema_type(Type::Number)
        .minimum(Some(-100))
        .maximum(Some(100));
    let biases = ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(id))
        .additional_properties(Some(bias))
        .max_properties(Some(MAX_LOGIT_BIASES));
    AnyOfBuilder::new()
        .description(Some(
            "Values to add to token logits before sampling, by token id.",
        ))
        .item(biases)
        .item(null_schema())
        .into()
}

/// Copies `message` once for each prompt.
pub(super) fn messages(
    prompts: Vec<Input>,
    message: &v1::CompletionRequest,
) -> Vec<v1::CompletionRequest> {
    let with_prompt = |input| v1::CompletionRequest {
        input: Some(input),
        ..message.clone()
    };
    prompts.into_iter().map(with_prompt).collect()
}

/// Rejects a request for more than [`MAX_CHOICES`] choices in total. The error names `param`, the field with the
/// number of choices per prompt. If there are too many prompts even with one choice each, the error names `prompt`.
pub(super) fn check_choices(
    prompts: usize,
    choices_per_prompt: u32,
    param: &str,
) -> Result<(), Error> {
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
