//! Converts a completion request into vLLM's request.
//!
//! Most fields that the client leaves out are left out, so that the engine's defaults apply. `max_tokens`,
//! `temperature` and the seed are always sent: without them vLLM's gRPC API generates 20 tokens greedily.

use vllm_proto::generate_request::Prompt;
use vllm_proto::{
    DecodingParameters, GenerateRequest, KvCacheParameters, RandomSampling, ResponseOptions,
    StoppingCriteria, TokenIds,
};

use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::{DEFAULT_MAX_TOKENS, Sampling};

/// Fields of a completion request that vLLM's gRPC API does not have.
pub(super) const UNSUPPORTED_FIELDS: [&str; 5] =
    ["chat", "echo", "resume", "include_stamps", "suffix"];

/// Converts a request.
///
/// # Errors
/// The request has no prompt, or it uses a field that vLLM's gRPC API does not have.
pub(super) fn generate_request(
    message: v1::CompletionRequest,
    request_id: &str,
    seed: i64,
) -> Result<GenerateRequest, Error> {
    check_supported(&message)?;
    let max_new_tokens = message.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    if max_new_tokens == 0 {
        let text = "max_tokens must be at least 1 (got 0).";
        return Err(Error::invalid_value("max_tokens", text));
    }
    let sampling = sampling(&message, seed);
    Ok(GenerateRequest {
        request_id: request_id.to_owned(),
        model: message.model,
        prompt: Some(prompt(message.input)?),
        temperature: Some(
            message
                .temperature
                .unwrap_or(Sampling::default().temperature),
        ),
        sampling: Some(sampling),
        decoding: Some(DecodingParameters {
            presence_penalty: message.presence_penalty.unwrap_or_default(),
            frequency_penalty: message.frequency_penalty.unwrap_or_default(),
            // vLLM reads 0 as "not set".
            repetition_penalty: message.repetition_penalty.unwrap_or_default(),
            logit_bias: message.logit_bias,
            ..DecodingParameters::default()
        }),
        stopping: Some(StoppingCriteria {
            max_new_tokens,
            min_new_tokens: message.min_tokens,
            stop_token_ids: message.stop_token_ids,
            stop_strings: message.stop,
            include_stop_strings: message.include_stop_str_in_output,
            ignore_eos: message.ignore_eos,
            thinking_token_budget: None,
        }),
        response: Some(ResponseOptions {
            output_text: Some(true),
            output_token_ids: true,
            output_logprobs: message.logprobs.is_some(),
            ..ResponseOptions::default()
        }),
        kv: (!message.cache_salt.is_empty()).then(|| KvCacheParameters {
            cache_salt: message.cache_salt,
            ..KvCacheParameters::default()
        }),
        priority: message.priority.unwrap_or_default(),
        ..GenerateRequest::default()
    })
}

fn prompt(input: Option<Input>) -> Result<Prompt, Error> {
    match input {
        Some(Input::Prompt(text)) => Ok(Prompt::Text(text)),
        Some(Input::PromptTokenIds(v1::TokenIds { ids })) => Ok(Prompt::TokenIds(TokenIds { ids })),
        Some(Input::Chat(_)) => Err(chat_error()),
        None => {
            let text = "One of prompt and prompt_token_ids is required.";
            Err(Error::new(ErrorKind::MissingParameter, text).with_param("prompt"))
        }
    }
}

fn sampling(message: &v1::CompletionRequest, seed: i64) -> RandomSampling {
    // -1 and 0 both keep all tokens. vLLM's gRPC API has no negative values.
    let top_k = message.top_k.map(|top_k| u32::try_from(top_k).unwrap_or(0));
    // vLLM rejects a `top_p` of 0, which keeps only the most likely token. A `top_k` of 1 means the same.
    let is_greedy = message.top_p == Some(0.0);
    RandomSampling {
        num_sequences: message.n.unwrap_or(1),
        top_k: if is_greedy { Some(1) } else { top_k },
        top_p: message.top_p.filter(|_| !is_greedy),
        min_p: message.min_p,
        seed: Some(seed),
    }
}

/// Rejects fields that vLLM's gRPC API does not have, and `logprobs` above 0: vLLM reports the ids of the other likely
/// tokens, but not their bytes.
fn check_supported(message: &v1::CompletionRequest) -> Result<(), Error> {
    if matches!(message.input, Some(Input::Chat(_))) {
        return Err(chat_error());
    }
    for (param, is_used) in [
        ("echo", message.echo),
        ("resume", !message.resume.is_empty()),
        ("include_stamps", message.include_stamps),
        ("suffix", message.suffix.is_some()),
    ] {
        if is_used {
            let text = format!("The model's engine does not support {param}. Leave it out.");
            return Err(unsupported(param, text));
        }
    }
    match message.logprobs {
        Some(top @ 1..) => {
            let text = format!(
                "logprobs must be 0 for this model (got {top}): its engine reports log probabilities only for \
                 generated tokens."
            );
            Err(unsupported("logprobs", text))
        }
        Some(0) | None => Ok(()),
    }
}

fn chat_error() -> Error {
    let text = "The model's engine does not support chats over vLLM's gRPC API. Send a prompt to /v1/completions, or \
                connect the gateway to the engine's HTTP API with --engine openai+http://host:port/v1.";
    unsupported("chat", text)
}

fn unsupported(param: &str, text: impl Into<String>) -> Error {
    Error::new(ErrorKind::UnsupportedParameter, text).with_param(param)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(text: &str) -> v1::CompletionRequest {
        v1::CompletionRequest {
            input: Some(Input::Prompt(text.to_owned())),
            ..v1::CompletionRequest::default()
        }
    }

    fn converted(message: v1::CompletionRequest) -> GenerateRequest {
        generate_request(message, "id", 7).expect("a valid request")
    }

    fn sampling_of(message: v1::CompletionRequest) -> RandomSampling {
        converted(message).sampling.expect("it is set")
    }

    #[test]
    fn the_defaults_that_differ_from_vllms_are_always_sent() {
        let expected = GenerateRequest {
            request_id: "id".to_owned(),
            prompt: Some(Prompt::Text("hi".to_owned())),
            temperature: Some(1.0),
            sampling: Some(RandomSampling {
                num_sequences: 1,
                seed: Some(7),
                ..RandomSampling::default()
            }),
            decoding: Some(DecodingParameters::default()),
            stopping: Some(StoppingCriteria {
                max_new_tokens: 16,
                ..StoppingCriteria::default()
            }),
            response: Some(ResponseOptions {
                output_text: Some(true),
                output_token_ids: true,
                ..ResponseOptions::default()
            }),
            ..GenerateRequest::default()
        };
        assert_eq!(converted(prompt("hi")), expected);
    }

    #[test]
    fn every_option_has_its_field_in_vllms_request() {
        let message = v1::CompletionRequest {
            model: "m".to_owned(),
            input: Some(Input::PromptTokenIds(v1::TokenIds { ids: vec![3, 1] })),
            max_tokens: Some(9),
            n: Some(2),
            temperature: Some(0.0),
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
            priority: Some(-5),
            logprobs: Some(0),
            user: "u".to_owned(),
            cache_salt: "salt".to_owned(),
            ..v1::CompletionRequest::default()
        };
        let expected = GenerateRequest {
            request_id: "id".to_owned(),
            model: "m".to_owned(),
            prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![3, 1] })),
            temperature: Some(0.0),
            sampling: Some(RandomSampling {
                num_sequences: 2,
                top_k: Some(4),
                top_p: Some(0.25),
                min_p: Some(0.125),
                seed: Some(7),
            }),
            decoding: Some(DecodingParameters {
                presence_penalty: 1.0,
                frequency_penalty: -1.0,
                repetition_penalty: 1.5,
                logit_bias: [(3, -2.0)].into(),
                ..DecodingParameters::default()
            }),
            stopping: Some(StoppingCriteria {
                max_new_tokens: 9,
                min_new_tokens: 1,
                stop_token_ids: vec![2],
                stop_strings: vec!["x".to_owned()],
                include_stop_strings: true,
                ignore_eos: true,
                thinking_token_budget: None,
            }),
            response: Some(ResponseOptions {
                output_text: Some(true),
                output_token_ids: true,
                output_logprobs: true,
                ..ResponseOptions::default()
            }),
            kv: Some(KvCacheParameters {
                cache_salt: "salt".to_owned(),
                ..KvCacheParameters::default()
            }),
            priority: -5,
            ..GenerateRequest::default()
        };
        assert_eq!(converted(message), expected);
    }

    #[test]
    fn values_that_vllm_writes_in_another_way_keep_their_meaning() {
        for (top_k, expected) in [(-1, 0), (0, 0), (3, 3)] {
            let sampling = sampling_of(v1::CompletionRequest {
                top_k: Some(top_k),
                ..prompt("hi")
            });
            assert_eq!(sampling.top_k, Some(expected), "{top_k}");
        }
        let sampling = sampling_of(v1::CompletionRequest {
            top_p: Some(0.0),
            top_k: Some(9),
            ..prompt("hi")
        });
        assert_eq!((sampling.top_p, sampling.top_k), (None, Some(1)));
    }

    #[test]
    fn a_field_that_vllms_grpc_api_does_not_have_is_named() {
        let default = v1::CompletionRequest::default;
        let chat = Some(Input::Chat(v1::Chat::default()));
        let resumed = vec![v1::ResumedChoice::default()];
        for (param, message) in [
            (
                "chat",
                v1::CompletionRequest {
                    input: chat,
                    ..default()
                },
            ),
            (
                "echo",
                v1::CompletionRequest {
                    echo: true,
                    ..default()
                },
            ),
            (
                "resume",
                v1::CompletionRequest {
                    resume: resumed,
                    ..default()
                },
            ),
            (
                "include_stamps",
                v1::CompletionRequest {
                    include_stamps: true,
                    ..default()
                },
            ),
            (
                "suffix",
                v1::CompletionRequest {
                    suffix: Some(String::new()),
                    ..default()
                },
            ),
            (
                "logprobs",
                v1::CompletionRequest {
                    logprobs: Some(1),
                    ..default()
                },
            ),
        ] {
            let error = generate_request(message, "id", 7).expect_err(param);
            assert_eq!(error.kind, ErrorKind::UnsupportedParameter, "{error}");
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }

    #[test]
    fn a_request_for_no_tokens_is_rejected() {
        // vLLM would generate 20 tokens.
        let message = v1::CompletionRequest {
            max_tokens: Some(0),
            ..prompt("hi")
        };
        let error = generate_request(message, "id", 7).expect_err("max_tokens is 0");
        assert_eq!(error.param.as_deref(), Some("max_tokens"));
    }
}
