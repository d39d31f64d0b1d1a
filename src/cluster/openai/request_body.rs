//! Writes the body of a request to an OpenAI-compatible engine.

use std::collections::HashMap;

use serde::Serialize;

use super::flavor::Flavor;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::DEFAULT_MAX_TOKENS;

/// A request to an engine: the path below the engine's base URL, and the JSON body.
pub(super) struct EngineRequest {
    pub(super) path: &'static str,
    pub(super) body: Vec<u8>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    return_token_ids: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    continue_final_message: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    add_generation_prompt: Option<bool>,
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
struct Message<'a> {
    role: &'a str,
    content: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
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
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl EngineRequest {
    /// Writes a request.
    ///
    /// # Errors
    /// The request has no prompt, or it uses a field that no such engine has.
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
        let (path, input, default_max_tokens) = match &message.input {
            Some(Input::Chat(chat)) => ("/chat/completions", chat_input(chat), None),
            Some(Input::Prompt(text)) => {
                let input = completion_input(Prompt::Text(text), message);
                ("/completions", input, Some(DEFAULT_MAX_TOKENS))
            }
            Some(Input::PromptTokenIds(v1::TokenIds { ids })) => {
                let input = completion_input(Prompt::TokenIds(ids), message);
                ("/completions", input, Some(DEFAULT_MAX_TOKENS))
            }
            None => {
                let text = "One of prompt, prompt_token_ids and chat is required.";
                return Err(Error::new(ErrorKind::MissingParameter, text).with_param("prompt"));
            }
        };
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
            return_token_ids: flavor.reports_token_ids().then_some(true),
            // llama.cpp always continues a last message of the assistant, and does not know these fields.
            continue_final_message: (continues_message && flavor == Flavor::Vllm).then_some(true),
            add_generation_prompt: (continues_message && flavor == Flavor::Vllm).then_some(false),
        };
        let body = serde_json::to_vec(&body).map_err(|error| {
            tracing::error!(%error, "cannot write the request to an engine");
            Error::internal()
        })?;
        Ok(Self { path, body })
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
            user: &message.user,
        }
    }
}

fn completion_input<'a>(prompt: Prompt<'a>, message: &'a v1::CompletionRequest) -> BodyInput<'a> {
    BodyInput::Completion {
        prompt,
        suffix: message.suffix.as_deref(),
    }
}

fn chat_input(chat: &v1::Chat) -> BodyInput<'_> {
    let messages = chat.messages.iter().map(|message| Message {
        role: &message.role,
        content: &message.content,
        name: &message.name,
    });
    BodyInput::Chat {
        messages: messages.collect(),
    }
}

/// Rejects fields that this gateway cannot pass to an OpenAI-compatible engine.
fn check_supported(message: &v1::CompletionRequest, flavor: Flavor) -> Result<(), Error> {
    let includes_stop = message.include_stop_str_in_output && !flavor.includes_stop_string();
    for (param, is_used) in [
        ("echo", message.echo),
        ("resume", !message.resume.is_empty()),
        ("include_stamps", message.include_stamps),
        ("include_stop_str_in_output", includes_stop),
    ] {
        if is_used {
            let text = format!("The model's engine does not support {param}. Leave it out.");
            return Err(Error::new(ErrorKind::UnsupportedParameter, text).with_param(param));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(flavor: Flavor) -> BodyFacts<'static> {
        BodyFacts {
            model: "m",
            seed: 7,
            flavor,
            continues_message: false,
        }
    }

    fn request(message: &v1::CompletionRequest, flavor: Flavor) -> (&'static str, Value) {
        let request = EngineRequest::new(message, &facts(flavor)).expect("a valid request");
        let body = serde_json::from_slice(&request.body).expect("the body is JSON");
        (request.path, body)
    }

    fn prompt(text: &str) -> v1::CompletionRequest {
        v1::CompletionRequest {
            input: Some(Input::Prompt(text.to_owned())),
            ..v1::CompletionRequest::default()
        }
    }

    #[test]
    fn fields_that_the_client_leaves_out_are_left_to_the_engine() {
        let body = json!({
            "model": "m", "prompt": "hi", "max_tokens": 16, "seed": 7,
            "stream": true, "stream_options": {"include_usage": true},
        });
        assert_eq!(
            request(&prompt("hi"), Flavor::Other),
            ("/completions", body)
        );
    }

    #[test]
    fn a_chat_is_sent_as_a_chat_and_may_fill_the_context() {
        let message = v1::CompletionRequest {
            input: Some(Input::Chat(v1::Chat {
                messages: vec![
                    v1::ChatMessage {
                        role: "system".to_owned(),
                        content: "Be brief.".to_owned(),
                        name: String::new(),
                    },
                    v1::ChatMessage {
                        role: "user".to_owned(),
                        content: "hi".to_owned(),
                        name: "ann".to_owned(),
                    },
                ],
            })),
            ..v1::CompletionRequest::default()
        };
        let (path, body) = request(&message, Flavor::Other);
        assert_eq!(path, "/chat/completions");
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "ann"},
        ]);
        assert_eq!(
            (&body["messages"], &body["max_tokens"]),
            (&messages, &Value::Null)
        );
    }

    #[test]
    fn every_option_has_its_name_in_openais_api() {
        let message = v1::CompletionRequest {
            max_tokens: Some(9),
            n: Some(2),
            temperature: Some(0.5),
            top_p: Some(0.25),
            top_k: Some(4),
            min_p: Some(0.125),
            presence_penalty: Some(1.0),
            frequency_penalty: Some(-1.0),
            repetition_penalty: Some(1.5),
            logit_bias: [(3, -2.0)].into(),
            stop: vec!["x".to_owned()],
            stop_token_ids: vec![2],
            include_stop_str_in_output: true,
            min_tokens: 1,
            ignore_eos: true,
            user: "u".to_owned(),
            suffix: Some("end".to_owned()),
            ..prompt("hi")
        };
        let (_, body) = request(&message, Flavor::Vllm);
        let expected = json!({
            "model": "m", "prompt": "hi", "suffix": "end", "max_tokens": 9, "seed": 7, "n": 2,
            "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
            "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125,
            "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
            "logit_bias": {"3": -2.0}, "stop": ["x"], "stop_token_ids": [2],
            "include_stop_str_in_output": true, "min_tokens": 1, "ignore_eos": true, "user": "u",
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn token_ids_are_sent_as_ids() {
        let message = v1::CompletionRequest {
            input: Some(Input::PromptTokenIds(v1::TokenIds { ids: vec![1, 2] })),
            ..v1::CompletionRequest::default()
        };
        assert_eq!(request(&message, Flavor::Other).1["prompt"], json!([1, 2]));
    }

    #[test]
    fn a_field_that_cannot_be_passed_on_is_named() {
        let cases = [
            (
                "echo",
                v1::CompletionRequest {
                    echo: true,
                    ..prompt("a")
                },
            ),
            (
                "include_stamps",
                v1::CompletionRequest {
                    include_stamps: true,
                    ..prompt("a")
                },
            ),
            (
                "resume",
                v1::CompletionRequest {
                    resume: vec![v1::ResumedChoice::default()],
                    ..prompt("a")
                },
            ),
        ];
        for (param, message) in cases {
            let rejected = EngineRequest::new(&message, &facts(Flavor::Vllm));
            let error = rejected.err().expect("the request is rejected");
            assert_eq!(error.kind, ErrorKind::UnsupportedParameter);
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
