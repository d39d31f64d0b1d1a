//! Writes the body of a request to an OpenAI-compatible engine.

use std::collections::HashMap;

use prost::Message as _;
use serde::Serialize;

use super::flavor::Flavor;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::DEFAULT_MAX_TOKENS;

pub(super) mod chat;
mod extra_fields;
#[cfg(test)]
mod tests;

use chat::{ChatOptions, Message};
use extra_fields::ExtraFields;

/// An API of an engine for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// `/completions` below the base URL.
    Completions,
    /// `/chat/completions` below the base URL.
    Chats,
    /// `/completion` beside `/v1`: llama.cpp's own API, which reports token ids.
    LlamaCpp,
}

/// A request to an engine.
pub(super) struct EngineRequest {
    pub(super) api: Api,
    /// The JSON body.
    pub(super) body: Vec<u8>,
    /// True if the request asks for the ids of the tokens, and the engine can report them.
    pub(super) reports_token_ids: bool,
}

/// Facts that a body contains besides the client's request.
#[derive(Clone, Copy)]
pub(super) struct BodyFacts<'a> {
    /// Name under which the engine knows the model.
    pub(super) model: &'a str,
    pub(super) seed: i64,
    pub(super) flavor: Flavor,
    /// True if the chat ends with the start of the assistant's answer.
    pub(super) continues_message: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(flatten)]
    input: BodyInput<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    stream: bool,
    stream_options: StreamOptions,
    seed: i64,
    #[serde(flatten)]
    options: Options<'a>,
    #[serde(flatten)]
    logprobs: Option<RequestedLogprobs>,
    #[serde(flatten)]
    chat_options: ChatOptions<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    return_token_ids: Option<bool>,
    /// llama.cpp's name of `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    return_tokens: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    continue_final_message: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    add_generation_prompt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
    #[serde(flatten)]
    extra_fields: ExtraFields<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum BodyInput<'a> {
    Completion {
        prompt: Prompt<'a>,
        #[serde(skip_serializing_if = "Option::is_none")]
        suffix: Option<&'a str>,
    },
    Chat {
        messages: Vec<Message<'a>>,
    },
}

#[derive(Serialize)]
#[serde(untagged)]
enum Prompt<'a> {
    Text(&'a str),
    TokenIds(&'a [u32]),
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// Options that are left out unless the client sets them, so that the engine's own defaults apply.
#[derive(Serialize)]
struct Options<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    logit_bias: &'a HashMap<u32, f32>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    stop_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "is_default")]
    include_stop_str_in_output: bool,
    #[serde(skip_serializing_if = "is_default")]
    min_tokens: u32,
    #[serde(skip_serializing_if = "is_default")]
    ignore_eos: bool,
    #[serde(skip_serializing_if = "is_default")]
    echo: bool,
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    cache_salt: &'a str,
}

/// The request for log probabilities, in the form of each API.
#[derive(Serialize)]
#[serde(untagged)]
enum RequestedLogprobs {
    LlamaCpp { n_probs: u32 },
    Completion { logprobs: u32 },
    Chat { logprobs: bool, top_logprobs: u32 },
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl EngineRequest {
    /// Writes a request.
    ///
    /// # Errors
    /// The request has no prompt, uses a field that this kind of server does not have, or has an invalid tool, tool
    /// choice, format or extra field.
    pub(super) fn new(
        message: &v1::CompletionRequest,
        facts: &BodyFacts<'_>,
    ) -> Result<Self, Error> {
        let BodyFacts {
            model,
            seed,
            flavor,
            continues_message,
        } = *facts;
        check_supported(message, flavor)?;
        let text_api = match flavor {
            Flavor::LlamaCpp => Api::LlamaCpp,
            Flavor::Vllm | Flavor::LlamaCppV1 | Flavor::Other => Api::Completions,
        };
        let (api, input, default_max_tokens) = match &message.input {
            Some(Input::Chat(chat)) => {
                let messages = chat::messages(chat, flavor);
                (Api::Chats, BodyInput::Chat { messages }, None)
            }
            Some(Input::Prompt(text)) => {
                let input = completion_input(Prompt::Text(text), message);
                (text_api, input, Some(DEFAULT_MAX_TOKENS))
            }
            Some(Input::PromptTokenIds(v1::TokenIds { ids })) => {
                let input = completion_input(Prompt::TokenIds(ids), message);
                (text_api, input, Some(DEFAULT_MAX_TOKENS))
            }
            None => {
                let text = "One of prompt, prompt_token_ids and chat is required.";
                return Err(Error::new(ErrorKind::MissingParameter, text).with_param("prompt"));
            }
        };
        // With ids, vLLM leaves the echoed prompt out of the text.
        let asks_for_ids = flavor == Flavor::Vllm && !message.echo;
        let body = Body {
            model,
            input,
            max_tokens: message.max_tokens.or(default_max_tokens),
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
            seed,
            options: Options::of(message),
            logprobs: RequestedLogprobs::of(message, api, flavor),
            chat_options: ChatOptions::of(message)?,
            return_token_ids: asks_for_ids.then_some(true),
            return_tokens: (api == Api::LlamaCpp).then_some(true),
            // llama.cpp always continues a last message of the assistant, and does not know these fields.
            continue_final_message: (continues_message && flavor == Flavor::Vllm).then_some(true),
            add_generation_prompt: (continues_message && flavor == Flavor::Vllm).then_some(false),
            priority: message.priority.filter(|_| flavor == Flavor::Vllm),
            extra_fields: ExtraFields::of(message)?,
        };
        let mut json = Vec::with_capacity(expected_size(message));
        serde_json::to_writer(&mut json, &body).map_err(|error| {
            tracing::error!(%error, "cannot write the request to an engine");
            Error::internal()
        })?;
        Ok(Self {
            api,
            body: json,
            reports_token_ids: asks_for_ids || api == Api::LlamaCpp,
        })
    }
}

impl<'a> Options<'a> {
    fn of(message: &'a v1::CompletionRequest) -> Self {
        Self {
            n: message.n.filter(|n| *n != 1),
            temperature: message.temperature,
            top_p: message.top_p,
            top_k: message.top_k.filter(|top_k| *top_k > 0),
            min_p: message.min_p.filter(|min_p| *min_p > 0.0),
            presence_penalty: message.presence_penalty,
            frequency_penalty: message.frequency_penalty,
            repetition_penalty: message.repetition_penalty.filter(|penalty| *penalty != 1.0),
            logit_bias: &message.logit_bias,
            stop: &message.stop,
            stop_token_ids: &message.stop_token_ids,
            include_stop_str_in_output: message.include_stop_str_in_output,
            min_tokens: message.min_tokens,
            ignore_eos: message.ignore_eos,
            echo: message.echo,
            user: &message.user,
            cache_salt: &message.cache_salt,
        }
    }
}

impl RequestedLogprobs {
    fn of(message: &v1::CompletionRequest, api: Api, flavor: Flavor) -> Option<Self> {
        let top = message.logprobs?;
        // llama.cpp reports nothing at all for 0. The answer leaves out what the client did not ask for.
        let top = match flavor {
            Flavor::LlamaCpp | Flavor::LlamaCppV1 => top.max(1),
            Flavor::Vllm | Flavor::Other => top,
        };
        Some(match api {
            Api::Chats => Self::Chat {
                logprobs: true,
                top_logprobs: top,
            },
            Api::Completions => Self::Completion { logprobs: top },
            Api::LlamaCpp => Self::LlamaCpp { n_probs: top },
        })
    }
}

/// Returns the size that the body of most requests does not exceed, so that a large prompt is not copied while its body
/// grows.
fn expected_size(message: &v1::CompletionRequest) -> usize {
    let prompt = message.encoded_len();
    prompt + prompt / 8 + 512
}

fn completion_input<'a>(prompt: Prompt<'a>, message: &'a v1::CompletionRequest) -> BodyInput<'a> {
    BodyInput::Completion {
        prompt,
        suffix: message.suffix.as_deref(),
    }
}

/// Rejects fields that this gateway cannot pass to an OpenAI-compatible engine.
fn check_supported(message: &v1::CompletionRequest, flavor: Flavor) -> Result<(), Error> {
    let includes_stop = message.include_stop_str_in_output && !flavor.includes_stop_string();
    // The prompt's text is needed to tell it from the text of the completion.
    let is_text = matches!(message.input, Some(Input::Prompt(_)));
    let echoes = message.echo && !(flavor.echoes_prompts() && is_text);
    for (param, is_used) in [
        ("echo", echoes),
        ("resume", !message.resume.is_empty()),
        ("include_stamps", message.include_stamps),
        ("include_stop_str_in_output", includes_stop),
    ] {
        if is_used {
            let text = format!("The model's engine does not support {param}. Leave it out.");
            return Err(Error::new(ErrorKind::UnsupportedParameter, text).with_param(param));
        }
    }
    if !message.cache_salt.is_empty() && !flavor.isolates_prompts() {
        // The gateway, and not the client, may have set the salt.
        let text = "The model's engine does not support cache_salt, which the request has or a gateway with \
                    --prefix-sharing caller adds. Leave it out, or use an engine that supports it: Tokenway or vLLM.";
        return Err(Error::new(ErrorKind::UnsupportedParameter, text).with_param("cache_salt"));
    }
    Ok(())
}
