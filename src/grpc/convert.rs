//! The proto's messages as the engine's requests, checked field by field.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_request::Input as ProtoInput;
use crate::request::{
    Caller, ChatMessage, CompletionRequest, DEFAULT_MAX_TOKENS, Input, LONGEST_TIMEOUT,
    MAX_CHOICES, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_USER_BYTES, RequestId, Sampling,
};

/// The model's name, or `None` where the field is empty.
pub(super) fn model_name(model: &str) -> Option<&str> {
    Some(model).filter(|name| !name.is_empty())
}

/// A request as its client sent it, or the first field that is at fault.
pub(super) fn completion_request(
    message: v1::CompletionRequest,
    id: RequestId,
    timeout: Duration,
) -> Result<CompletionRequest, Error> {
    let arrived = Instant::now();
    refuse_unsupported(&message)?;
    let sampling = sampling(&message)?;
    let max_tokens = message.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    let choices = message.n.unwrap_or(1);
    check("max_tokens", max_tokens >= 1, "at least 1")?;
    check("n", (1..=MAX_CHOICES).contains(&choices), "from 1 to 128")?;
    check(
        "stop",
        message.stop.len() <= MAX_STOP_STRINGS,
        "at most 16 strings",
    )?;
    check(
        "stop",
        message
            .stop
            .iter()
            .all(|stop| (1..=MAX_STOP_BYTES).contains(&stop.len())),
        "strings of 1 to 1024 bytes",
    )?;
    check(
        "user",
        message.user.len() <= MAX_USER_BYTES,
        "at most 512 bytes",
    )?;
    Ok(CompletionRequest {
        id,
        model: model_name(&message.model).map(str::to_owned),
        input: input(message.input)?,
        max_tokens,
        choices,
        sampling,
        stop: message.stop,
        seed: message.seed.map_or_else(rand::random, i64::cast_unsigned),
        priority: message.priority.unwrap_or(0),
        stamps: message.include_stamps,
        caller: Caller(
            Some(message.user)
                .filter(|user| !user.is_empty())
                .map(Into::into),
        ),
        arrived,
        deadline: arrived + timeout.min(LONGEST_TIMEOUT),
    })
}

fn input(input: Option<ProtoInput>) -> Result<Input, Error> {
    match input {
        None => Err(Error::new(
            ErrorKind::MissingParameter,
            "One of prompt, prompt_token_ids and chat is required.",
        )
        .with_param("prompt")),
        Some(ProtoInput::Prompt(text)) => Ok(Input::Text(text)),
        Some(ProtoInput::PromptTokenIds(v1::TokenIds { ids })) => {
            check("prompt_token_ids", !ids.is_empty(), "at least one id")?;
            Ok(Input::TokenIds(ids))
        }
        Some(ProtoInput::Chat(v1::Chat { messages })) => {
            check("chat", !messages.is_empty(), "at least one message")?;
            let message = |message: v1::ChatMessage| ChatMessage {
                role: message.role,
                content: message.content,
            };
            Ok(Input::Chat(messages.into_iter().map(message).collect()))
        }
    }
}

fn sampling(message: &v1::CompletionRequest) -> Result<Sampling, Error> {
    let default = Sampling::default();
    let top_k = message.top_k.unwrap_or(0);
    check("top_k", top_k >= -1, "at least 1, or 0 or -1 for all")?;
    let sampling = Sampling {
        temperature: message.temperature.unwrap_or(default.temperature),
        top_p: message.top_p.unwrap_or(default.top_p),
        top_k: u32::try_from(top_k).unwrap_or(0),
        min_p: message.min_p.unwrap_or(default.min_p),
        presence_penalty: message.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: message
            .frequency_penalty
            .unwrap_or(default.frequency_penalty),
        repetition_penalty: message
            .repetition_penalty
            .unwrap_or(default.repetition_penalty),
    };
    // NaN is in no range, so it is refused with the rest.
    let in_range = |value: f32, low, high| (low..=high).contains(&value);
    let above_zero = |value: f32, high| value > 0.0 && value <= high;
    check(
        "temperature",
        in_range(sampling.temperature, 0.0, 2.0),
        "from 0 to 2",
    )?;
    check("top_p", in_range(sampling.top_p, 0.0, 1.0), "from 0 to 1")?;
    check("min_p", in_range(sampling.min_p, 0.0, 1.0), "from 0 to 1")?;
    check(
        "presence_penalty",
        in_range(sampling.presence_penalty, -2.0, 2.0),
        "from -2 to 2",
    )?;
    check(
        "frequency_penalty",
        in_range(sampling.frequency_penalty, -2.0, 2.0),
        "from -2 to 2",
    )?;
    let repetition = above_zero(sampling.repetition_penalty, 2.0);
    check("repetition_penalty", repetition, "above 0 and at most 2")?;
    Ok(sampling)
}

/// Refuses what the contract names and this engine cannot do yet, rather than pass it over.
fn refuse_unsupported(message: &v1::CompletionRequest) -> Result<(), Error> {
    let unsupported = |param: &str| {
        let text = format!("{param} is not supported by this engine.");
        Err(Error::new(ErrorKind::UnsupportedParameter, text).with_param(param))
    };
    if message.logprobs.is_some() {
        return unsupported("logprobs");
    }
    if !message.resume.is_empty() {
        return unsupported("resume");
    }
    Ok(())
}

fn check(param: &str, holds: bool, range: &str) -> Result<(), Error> {
    if holds {
        Ok(())
    } else {
        Err(Error::invalid_value(
            param,
            format!("{param} must be {range}."),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(
        change: impl FnOnce(&mut v1::CompletionRequest),
    ) -> Result<CompletionRequest, Error> {
        let mut message = v1::CompletionRequest {
            input: Some(ProtoInput::Prompt("hello".to_owned())),
            ..v1::CompletionRequest::default()
        };
        change(&mut message);
        completion_request(message, RequestId::random(), Duration::from_secs(1))
    }

    #[test]
    fn what_is_not_said_has_openais_default() {
        let request = convert(|_| ()).unwrap();
        assert_eq!((request.max_tokens, request.choices), (16, 1));
        assert_eq!(request.sampling, Sampling::default());
        assert!(request.stop.is_empty());
    }

    #[test]
    fn what_is_out_of_range_is_refused_with_its_field() {
        type Change = fn(&mut v1::CompletionRequest);
        let cases: [(&str, Change); 15] = [
            ("prompt", |m| m.input = None),
            ("prompt_token_ids", |m| {
                m.input = Some(ProtoInput::PromptTokenIds(v1::TokenIds::default()));
            }),
            ("chat", |m| {
                m.input = Some(ProtoInput::Chat(v1::Chat::default()))
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
        ];
        for (param, change) in cases {
            let error = convert(change).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
            assert_eq!(error.kind.row().http, http::StatusCode::BAD_REQUEST);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_with_its_field() {
        let error = convert(|m| m.logprobs = Some(0)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::UnsupportedParameter);
        assert_eq!(error.param.as_deref(), Some("logprobs"));
        let error = convert(|m| m.resume = vec![v1::ResumedChoice::default()]).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("resume"));
    }

    #[test]
    fn a_timeout_that_no_clock_can_hold_is_ten_years() {
        let message = v1::CompletionRequest {
            input: Some(ProtoInput::Prompt("hello".to_owned())),
            ..v1::CompletionRequest::default()
        };
        let request = completion_request(message, RequestId::random(), Duration::MAX).unwrap();
        assert_eq!(request.deadline - request.arrived, LONGEST_TIMEOUT);
    }

    #[test]
    fn a_seed_is_kept_and_a_missing_one_is_drawn() {
        assert_eq!(
            convert(|m| m.seed = Some(-7)).unwrap().seed.cast_signed(),
            -7
        );
        let (one, other) = (convert(|_| ()).unwrap(), convert(|_| ()).unwrap());
        assert_ne!(one.seed, other.seed);
    }
}
