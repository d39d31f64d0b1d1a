//! Converts proto messages to the engine's request types, and checks every field.

use tokio::time::Instant;

use super::passed_on::passed_on_parameters;
use super::without_prompt::without_prompt;
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input as ProtoInput;
use crate::request::{
    ChatMessage, CompletionRequest, Input, MAX_CHOICES, MAX_STOP_BYTES, MAX_STOP_STRINGS,
    Parameter, RequestId, StopStringOptions, TokenId,
};
use crate::sequence_proto::{self, check_field};

/// Returns the model name, or `None` if the field is empty.
pub(super) fn model_name(model: &str) -> Option<&str> {
    Some(model).filter(|name| !name.is_empty())
}

/// Converts a request, or returns an error for the first invalid field.
pub(super) fn completion_request(
    message: v1::CompletionRequest,
    context: &RequestContext,
) -> Result<CompletionRequest, Error> {
    let (arrived, deadline) = (context.arrived(), context.deadline());
    convert_with_times(message, context.id().clone(), arrived, deadline)
}

pub(super) fn convert_with_times(
    mut message: v1::CompletionRequest,
    id: RequestId,
    arrived: Instant,
    deadline: Instant,
) -> Result<CompletionRequest, Error> {
    let seed = message.seed;
    let passed_on = passed_on_parameters(&message);
    let options = sequence_proto::take_options(&mut message)?;
    let choices = message.n.unwrap_or(1);
    check_field(
        "max_tokens",
        message.max_tokens != Some(0) || message.echo,
        "must be at least 1, or 0 with echo",
    )?;
    check_field(
        "n",
        (1..=MAX_CHOICES).contains(&choices),
        "must be from 1 to 128",
    )?;
    Ok(CompletionRequest {
        id,
        model: model_name(&message.model).map(str::to_owned),
        stopping: take_stop_strings(&mut message)?,
        input: convert_input(message.input, message.suffix)?,
        max_tokens: message.max_tokens,
        choices,
        options,
        resume: resumed_token_ids(message.resume, choices, seed)?,
        echo: message.echo,
        passed_on,
        priority: message.priority.unwrap_or(0),
        arrived,
        deadline,
    })
}

/// Returns the first of these parameters that a request uses, or `None`.
///
/// The request is converted only if one of `parameters` is among those that a runner may support. The prompt is not
/// copied.
///
/// # Errors
/// Returns an error for the first invalid field of a request that was converted.
pub(crate) fn first_used_parameter(
    message: &v1::CompletionRequest,
    parameters: &[Parameter],
) -> Result<Option<Parameter>, Error> {
    let used = passed_on_parameters(message);
    let passed_on = parameters.iter().find(|it| used.contains(it));
    let is_passed_on = |it: &Parameter| Parameter::PASSED_ON.contains(it);
    if passed_on.is_some() || parameters.iter().all(is_passed_on) {
        return Ok(passed_on.copied());
    }
    let now = Instant::now();
    let request = convert_with_times(without_prompt(message), RequestId::random(), now, now)?;
    let used = parameters
        .iter()
        .find(|parameter| request.uses_parameter(**parameter));
    Ok(used.copied())
}

/// Moves the stop strings out of the message and checks them.
fn take_stop_strings(message: &mut v1::CompletionRequest) -> Result<StopStringOptions, Error> {
    let strings = std::mem::take(&mut message.stop);
    check_field(
        "stop",
        strings.len() <= MAX_STOP_STRINGS,
        "must have at most 16 strings",
    )?;
    let fits = |stop: &String| (1..=MAX_STOP_BYTES).contains(&stop.len());
    check_field(
        "stop",
        strings.iter().all(fits),
        "must contain only strings of 1 to 1024 bytes",
    )?;
    Ok(StopStringOptions {
        strings,
        include_stop: message.include_stop_str_in_output,
    })
}

fn convert_input(input: Option<ProtoInput>, suffix: Option<String>) -> Result<Input, Error> {
    if let Some(suffix) = suffix {
        return match input {
            Some(ProtoInput::Prompt(prefix)) => Ok(Input::Infill { prefix, suffix }),
            Some(ProtoInput::PromptTokenIds(_) | ProtoInput::Chat(_)) | None => {
                let message = "suffix requires a text prompt. Set prompt, or leave out suffix.";
                Err(Error::invalid_value("suffix", message))
            }
        };
    }
    match input {
        None => Err(Error::new(
            ErrorKind::MissingParameter,
            "One of prompt, prompt_token_ids and chat is required.",
        )
        .with_param("prompt")),
        Some(ProtoInput::Prompt(text)) => Ok(Input::Text(text)),
        Some(ProtoInput::PromptTokenIds(v1::TokenIds { ids })) => {
            check_field(
                "prompt_token_ids",
                !ids.is_empty(),
                "must contain at least one id",
            )?;
            Ok(Input::TokenIds(ids))
        }
        Some(ProtoInput::Chat(chat)) => chat_messages(chat).map(Input::Chat),
    }
}

/// Converts the messages of a chat. There must be at least one, and each must have a role. The parts of a message that
/// no runner supports are left out; [`passed_on_parameters`] reports them.
pub(super) fn chat_messages(chat: v1::Chat) -> Result<Vec<ChatMessage>, Error> {
    check_field(
        "chat",
        !chat.messages.is_empty(),
        "must have at least one message",
    )?;
    let has_role = |message: &v1::ChatMessage| !message.role.is_empty();
    check_field(
        "chat",
        chat.messages.iter().all(has_role),
        "must have a role in every message",
    )?;
    let message = |message: v1::ChatMessage| ChatMessage {
        role: message.role,
        content: message.content,
        name: Some(message.name).filter(|name| !name.is_empty()),
    };
    Ok(chat.messages.into_iter().map(message).collect())
}

/// Returns the token ids that the client already has, indexed by choice. `seed` must be set too: without the seed of
/// the interrupted stream, the remaining tokens would be sampled differently.
fn resumed_token_ids(
    resumed: Vec<v1::ResumedChoice>,
    choices: u32,
    seed: Option<i64>,
) -> Result<Vec<Vec<TokenId>>, Error> {
    check_field(
        "seed",
        resumed.is_empty() || seed.is_some(),
        "must be set together with resume; the `started` event of the interrupted stream reports it",
    )?;
    let mut ids = Vec::new();
    for v1::ResumedChoice { choice, token_ids } in resumed {
        check_field("resume", choice < choices, "must refer to choices below n")?;
        let choice = usize::try_from(choice).unwrap_or(usize::MAX);
        if ids.len() <= choice {
            ids.resize(choice + 1, Vec::new());
        }
        check_field(
            "resume",
            ids[choice].is_empty(),
            "must list each choice once",
        )?;
        ids[choice] = token_ids;
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Sampling;
    use crate::telemetry::Api;

    fn convert(
        change: impl FnOnce(&mut v1::CompletionRequest),
    ) -> Result<CompletionRequest, Error> {
        let mut message = v1::CompletionRequest {
            input: Some(ProtoInput::Prompt("hello".to_owned())),
            ..v1::CompletionRequest::default()
        };
        change(&mut message);
        let context = RequestContext::for_test(Api::Grpc, http::Version::HTTP_2);
        completion_request(message, &context)
    }

    #[test]
    fn unset_fields_have_openais_defaults() {
        let request = convert(|_| ()).unwrap();
        assert_eq!((request.max_tokens, request.choices), (None, 1));
        assert_eq!(request.options.sampling, Sampling::default());
        assert!(request.stopping.strings.is_empty());
    }

    #[test]
    fn an_out_of_range_field_is_rejected_and_named() {
        type Change = fn(&mut v1::CompletionRequest);
        let cases: [(&str, Change); 26] = [
            ("prompt", |m| m.input = None),
            ("prompt_token_ids", |m| {
                m.input = Some(ProtoInput::PromptTokenIds(v1::TokenIds::default()));
            }),
            ("chat", |m| {
                m.input = Some(ProtoInput::Chat(v1::Chat::default()))
            }),
            ("chat", |m| {
                let messages = vec![v1::ChatMessage::default()];
                m.input = Some(ProtoInput::Chat(v1::Chat { messages }));
            }),
            ("max_tokens", |m| m.max_tokens = Some(0)),
            ("n", |m| m.n = Some(0)),
            ("n", |m| m.n = Some(129)),
            ("temperature", |m| m.temperature = Some(f32::NAN)),
            ("temperature", |m| m.temperature = Some(2.1)),
            ("top_p", |m| m.top_p = Some(1.5)),
            ("top_k", |m| m.top_k = Some(-2)),
            ("min_p", |m| m.min_p = Some(-0.1)),
            ("presence_penalty", |m| {
                m.presence_penalty = Some(f32::INFINITY)
            }),
            ("frequency_penalty", |m| m.frequency_penalty = Some(-2.1)),
            ("repetition_penalty", |m| m.repetition_penalty = Some(0.0)),
            ("stop", |m| m.stop = vec![String::new()]),
            ("stop_token_ids", |m| m.stop_token_ids = vec![0; 129]),
            ("logprobs", |m| m.logprobs = Some(21)),
            ("logit_bias", |m| m.logit_bias = [(1, 100.5)].into()),
            ("logit_bias", |m| m.logit_bias = [(1, f32::NAN)].into()),
            ("logit_bias", |m| {
                m.logit_bias = (0..1_025).map(|id| (id, 1.0)).collect();
            }),
            ("suffix", |m| {
                m.suffix = Some("b".to_owned());
                m.input = Some(ProtoInput::PromptTokenIds(v1::TokenIds { ids: vec![1] }));
            }),
            ("suffix", |m| {
                m.suffix = Some("b".to_owned());
                m.input = None;
            }),
            ("seed", |m| m.resume = vec![resumed(0, &[1])]),
            ("resume", |m| {
                m.seed = Some(1);
                m.resume = vec![resumed(1, &[1])];
            }),
            ("resume", |m| {
                m.seed = Some(1);
                m.resume = vec![resumed(0, &[1]), resumed(0, &[1])];
            }),
        ];
        for (param, change) in cases {
            let error = convert(change).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
            assert_eq!(error.kind.mapping().http, http::StatusCode::BAD_REQUEST);
        }
    }

    #[test]
    fn a_used_parameter_is_found_in_every_form_of_a_prompt_and_an_invalid_prompt_is_an_error() {
        let with_input = |input: Option<ProtoInput>| v1::CompletionRequest {
            input,
            logprobs: Some(1),
            ..v1::CompletionRequest::default()
        };
        let used = |input| first_used_parameter(&with_input(input), &Parameter::ALL);
        let message = v1::ChatMessage {
            role: "user".to_owned(),
            ..v1::ChatMessage::default()
        };
        let chat = |messages| Some(ProtoInput::Chat(v1::Chat { messages }));
        let ids = |ids| Some(ProtoInput::PromptTokenIds(v1::TokenIds { ids }));
        let text = Some(ProtoInput::Prompt("a".repeat(100)));
        for input in [text, ids(vec![7, 8]), chat(vec![message])] {
            assert_eq!(used(input), Ok(Some(Parameter::Logprobs)));
        }
        let roleless = vec![v1::ChatMessage::default()];
        for input in [None, ids(Vec::new()), chat(Vec::new()), chat(roleless)] {
            assert!(used(input).is_err());
        }
        let infill = v1::CompletionRequest {
            suffix: Some("b".to_owned()),
            ..with_input(Some(ProtoInput::Prompt("a".to_owned())))
        };
        let suffix = first_used_parameter(&infill, &[Parameter::Suffix]);
        assert_eq!(suffix, Ok(Some(Parameter::Suffix)));
    }

    #[test]
    fn resumed_token_ids_are_stored_by_choice() {
        let request = convert(|m| {
            m.n = Some(3);
            m.seed = Some(1);
            m.resume = vec![resumed(2, &[7, 8]), resumed(0, &[9])];
        });
        let expected = vec![vec![9], vec![], vec![7, 8]];
        assert_eq!(request.unwrap().resume, expected);
    }

    fn resumed(choice: u32, ids: &[u32]) -> v1::ResumedChoice {
        v1::ResumedChoice {
            choice,
            token_ids: ids.to_vec(),
        }
    }

    #[test]
    fn a_given_seed_is_kept_and_a_missing_seed_is_random() {
        assert_eq!(
            convert(|m| m.seed = Some(-7))
                .unwrap()
                .options
                .seed
                .cast_signed(),
            -7
        );
        let (one, other) = (convert(|_| ()).unwrap(), convert(|_| ()).unwrap());
        assert_ne!(one.options.seed, other.options.seed);
    }
}
