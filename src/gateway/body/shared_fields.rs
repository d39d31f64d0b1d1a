//! The fields that both kinds of completion share.

use std::collections::HashMap;

use serde_json::Value;
use utoipa::ToSchema;

use super::{StreamOptions, schema};
use crate::error::Error;
use crate::gateway::fields::{Fields, Unsupported};
use crate::proto::v1;
use crate::request::{
    MAX_LOGIT_BIASES, MAX_MODEL_NAME_BYTES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS,
    MAX_USER_BYTES, TokenId,
};

/// How to generate, and how to answer.
#[derive(Debug, ToSchema)]
pub(in crate::gateway) struct SharedFields {
    /// The model. It may be left out where only one is served.
    #[schema(max_length = 256)]
    pub(super) model: Option<String>,
    /// How many choices to generate for each prompt. Prompts times choices are at most 128.
    #[schema(minimum = 1, maximum = 128, default = 1)]
    pub(super) n: Option<u32>,
    /// Sampling temperature; 0 always takes the likeliest token.
    #[schema(minimum = 0, maximum = 2, default = 1)]
    pub(super) temperature: Option<f32>,
    /// Keeps the likeliest tokens whose probabilities add up to this.
    #[schema(minimum = 0, maximum = 1, default = 1)]
    pub(super) top_p: Option<f32>,
    /// Keeps this many of the likeliest tokens; 0 or -1 keeps all.
    #[schema(minimum = -1, default = 0)]
    pub(super) top_k: Option<i32>,
    /// Keeps tokens at least this likely relative to the likeliest.
    #[schema(minimum = 0, maximum = 1, default = 0)]
    pub(super) min_p: Option<f32>,
    /// Added against tokens that have been generated at all.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub(super) presence_penalty: Option<f32>,
    /// Added against tokens for each time they have been generated.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    pub(super) frequency_penalty: Option<f32>,
    /// Divides the logits of tokens in the prompt or the completion.
    #[schema(exclusive_minimum = 0, maximum = 2, default = 1)]
    pub(super) repetition_penalty: Option<f32>,
    /// Added to the logits of tokens before sampling, by their ids.
    #[schema(schema_with = schema::logit_bias, required = false)]
    pub(super) logit_bias: HashMap<TokenId, f32>,
    /// Seeds the sampling: the same seed, choice and position sample alike. One is drawn by default.
    pub(super) seed: Option<i64>,
    /// A string that ends a choice, or up to 16 of them. The text ends before the match.
    #[schema(schema_with = schema::stop, required = false)]
    pub(super) stop: Vec<String>,
    /// Up to 128 token ids that end a choice.
    #[schema(max_items = 128, required = false, nullable)]
    pub(super) stop_token_ids: Vec<TokenId>,
    /// Whether the text ends after the stop string or stop token that matched rather than before it.
    #[schema(default = false)]
    pub(super) include_stop_str_in_output: Option<bool>,
    /// No choice ends by the model's will, a stop string or a stop token before it has so many tokens; at
    /// most `max_tokens`.
    #[schema(default = 0)]
    pub(super) min_tokens: Option<u32>,
    /// Whether the end-of-sequence token is a token like any other, which ends nothing.
    #[schema(default = false)]
    pub(super) ignore_eos: Option<bool>,
    /// Lower goes first in the queue.
    #[schema(default = 0)]
    pub(super) priority: Option<i32>,
    /// Who the request is for, as the caller names them.
    #[schema(max_length = 512)]
    pub(super) user: Option<String>,
    /// Whether the tokens are sent one by one as they are generated.
    #[schema(default = false)]
    pub(super) stream: Option<bool>,
    /// What a stream holds besides the text. Only with `stream`.
    pub(super) stream_options: Option<StreamOptions>,
}

impl SharedFields {
    /// Hints that change no answer, with their descriptions. Their type is checked; then they are dropped.
    pub(in crate::gateway) const HINTS: [(&str, &str); 3] = [
        (
            "prompt_cache_key",
            "OpenAI's hint for its prompt cache. It changes nothing here.",
        ),
        (
            "prompt_cache_retention",
            "OpenAI's hint for its prompt cache. It changes nothing here.",
        ),
        (
            "safety_identifier",
            "OpenAI's successor of `user`. It changes nothing here.",
        ),
    ];

    /// What OpenAI or vLLM has and this server does not.
    pub(in crate::gateway) const UNSUPPORTED: &[Unsupported] = &[
        ("response_format", r#"[{"type": "text"}]"#),
        ("store", "[false]"),
        ("metadata", "[{}]"),
        ("service_tier", r#"["auto", "default"]"#),
        ("skip_special_tokens", "[true]"),
        ("spaces_between_special_tokens", "[true]"),
        ("use_beam_search", "[false]"),
        ("length_penalty", "[1]"),
    ];

    pub(super) fn read(fields: &mut Fields) -> Result<Self, Error> {
        fields.refuse(Self::UNSUPPORTED)?;
        for (hint, _) in Self::HINTS {
            fields.string(hint)?;
        }
        let stream = fields.bool("stream")?;
        let shared_fields = Self {
            stream_options: stream_options(fields, stream.unwrap_or(false))?,
            stream,
            model: fields.string("model")?,
            n: fields.integer("n")?,
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.integer("top_k")?,
            min_p: fields.number("min_p")?,
            presence_penalty: fields.number("presence_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            logit_bias: logit_bias(fields)?,
            seed: fields.integer("seed")?,
            stop: stop(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            include_stop_str_in_output: fields.bool("include_stop_str_in_output")?,
            min_tokens: fields.integer("min_tokens")?,
            ignore_eos: fields.bool("ignore_eos")?,
            priority: fields.integer("priority")?,
            user: fields.string("user")?,
        };
        if shared_fields.n == Some(0) {
            return Err(fields.invalid("n", "be at least 1"));
        }
        shared_fields.check_sizes()?;
        Ok(shared_fields)
    }

    /// What of the engine's message these fields say.
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
            ..v1::CompletionRequest::default()
        }
    }

    /// Whether the answer is a stream, and what it holds besides the text.
    pub(super) fn stream(&self) -> Option<StreamOptions> {
        let is_stream = self.stream.unwrap_or(false);
        is_stream.then(|| self.stream_options.unwrap_or_default())
    }

    /// What each prompt's message has a copy of must be small. Whether it is right, the engine says.
    fn check_sizes(&self) -> Result<(), Error> {
        let stop: usize = self.stop.iter().map(String::len).sum();
        let bytes = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        for (param, size, limit, unit) in [
            ("model", bytes(&self.model), MAX_MODEL_NAME_BYTES, "bytes"),
            ("stop", stop, MAX_STOP_STRINGS * MAX_STOP_BYTES, "bytes"),
            ("user", bytes(&self.user), MAX_USER_BYTES, "bytes"),
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
                let text = format!("{param} must be at most {limit} {unit}.");
                return Err(Error::invalid_value(param, text));
            }
        }
        Ok(())
    }
}

fn stream_options(fields: &mut Fields, is_stream: bool) -> Result<Option<StreamOptions>, Error> {
    let Some(mut options) = fields.object("stream_options")? else {
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
    const WANTED: &str = "a string or a list of strings";
    let items = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    let text = |item| match item {
        Value::String(stop) => Ok(stop),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            Err(fields.wrong_type("stop", WANTED, &item))
        }
    };
    items.into_iter().map(text).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<TokenId>, Error> {
    const NAME: &str = "stop_token_ids";
    let ids = fields.list(NAME, "a list of token ids")?;
    let ids = ids.unwrap_or_default();
    ids.iter().map(|id| fields.whole(NAME, id)).collect()
}

fn logit_bias(fields: &mut Fields) -> Result<HashMap<TokenId, f32>, Error> {
    const NAME: &str = "logit_bias";
    let Some(mut biases) = fields.object(NAME)? else {
        return Ok(HashMap::new());
    };
    let mut known = HashMap::new();
    for (id, bias) in biases.take_all() {
        let bias = biases.float(&id, &bias)?;
        // Another token_bytes of a number, such as `01`, would name a token twice.
        let token = id
            .parse()
            .ok()
            .filter(|token: &TokenId| token.to_string() == id);
        let token = token.ok_or_else(|| fields.invalid(NAME, "have token ids as its keys"))?;
        known.insert(token, bias);
    }
    Ok(known)
}
