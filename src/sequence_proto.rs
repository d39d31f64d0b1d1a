//! Conversion between [`SequenceOptions`] and the fields of the message `CompletionRequest` that carry them.
//!
//! The gRPC API reads these fields from its clients. The worker protocol passes them on to workers in the same
//! message. This module must not know the other fields.

use std::mem::take;

use crate::error::Error;
use crate::proto::v1;
use crate::request::{
    CacheSalt, EndUser, MAX_CACHE_SALT_BYTES, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_TOKENS,
    MAX_USER_BYTES, Sampling, SequenceOptions, StopTokens, TokenId,
};

/// Error: a field has an invalid value.
#[derive(Debug, thiserror::Error)]
#[error("{field} {rule}")]
pub(crate) struct InvalidField {
    field: &'static str,
    rule: &'static str,
}

impl From<InvalidField> for Error {
    fn from(invalid: InvalidField) -> Self {
        Self::invalid_value(invalid.field, format!("{invalid}."))
    }
}

/// Returns an error unless the field's value satisfies a rule.
pub(crate) fn check_field(
    field: &'static str,
    holds: bool,
    rule: &'static str,
) -> Result<(), InvalidField> {
    if holds {
        Ok(())
    } else {
        Err(InvalidField { field, rule })
    }
}

/// Moves the options out of a message and checks them. A missing seed becomes a random one.
///
/// # Errors
/// Returns an error for the first invalid field.
pub(crate) fn take_options(
    message: &mut v1::CompletionRequest,
) -> Result<SequenceOptions, InvalidField> {
    let logprobs = message.logprobs;
    check_field(
        "logprobs",
        logprobs.is_none_or(|top| top <= MAX_LOGPROBS),
        "must be from 0 to 20",
    )?;
    let user = take(&mut message.user);
    check_field(
        "user",
        user.len() <= MAX_USER_BYTES,
        "must be at most 512 bytes",
    )?;
    let cache_salt = take(&mut message.cache_salt);
    check_cache_salt(&cache_salt)?;
    let non_empty = |text: String| Some(text).filter(|text| !text.is_empty()).map(Into::into);
    Ok(SequenceOptions {
        seed: message.seed.map_or_else(rand::random, i64::cast_unsigned),
        sampling: sampling(message)?,
        logit_bias: take_logit_bias(message)?.into(),
        stop_tokens: take_stop_tokens(message)?,
        logprobs,
        timestamps: message.include_stamps,
        user: EndUser(non_empty(user)),
        cache_salt: CacheSalt(non_empty(cache_salt)),
    })
}

/// Returns an error if a salt is too long.
pub(crate) fn check_cache_salt(cache_salt: &str) -> Result<(), InvalidField> {
    let is_valid = cache_salt.len() <= MAX_CACHE_SALT_BYTES;
    check_field("cache_salt", is_valid, "must be at most 512 bytes")
}

/// Creates a message in which all options are set.
pub(crate) fn options_message(options: &SequenceOptions) -> v1::CompletionRequest {
    let SequenceOptions {
        seed,
        sampling,
        logit_bias,
        stop_tokens,
        logprobs,
        timestamps,
        user,
        cache_salt,
    } = options;
    v1::CompletionRequest {
        seed: Some(seed.cast_signed()),
        temperature: Some(sampling.temperature),
        top_p: Some(sampling.top_p),
        top_k: Some(i32::try_from(sampling.top_k).unwrap_or(i32::MAX)),
        min_p: Some(sampling.min_p),
        presence_penalty: Some(sampling.presence_penalty),
        frequency_penalty: Some(sampling.frequency_penalty),
        repetition_penalty: Some(sampling.repetition_penalty),
        logit_bias: logit_bias.iter().copied().collect(),
        stop_token_ids: stop_tokens.ids.to_vec(),
        ignore_eos: stop_tokens.ignore_eos,
        min_tokens: stop_tokens.min_tokens,
        logprobs: *logprobs,
        include_stamps: *timestamps,
        user: user.0.as_deref().unwrap_or_default().to_owned(),
        cache_salt: cache_salt.0.as_deref().unwrap_or_default().to_owned(),
        ..v1::CompletionRequest::default()
    }
}

fn sampling(message: &v1::CompletionRequest) -> Result<Sampling, InvalidField> {
    let default = Sampling::default();
    let top_k = message.top_k.unwrap_or(0);
    check_field(
        "top_k",
        top_k >= -1,
        "must be 0 or -1 (keep all tokens), or at least 1",
    )?;
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
    // NaN is in no range, so NaN is rejected too.
    let in_range = |value: f32, low, high| (low..=high).contains(&value);
    let above_zero = |value: f32, high| value > 0.0 && value <= high;
    check_field(
        "temperature",
        in_range(sampling.temperature, 0.0, 2.0),
        "must be from 0 to 2",
    )?;
    check_field(
        "top_p",
        in_range(sampling.top_p, 0.0, 1.0),
        "must be from 0 to 1",
    )?;
    check_field(
        "min_p",
        in_range(sampling.min_p, 0.0, 1.0),
        "must be from 0 to 1",
    )?;
    check_field(
        "presence_penalty",
        in_range(sampling.presence_penalty, -2.0, 2.0),
        "must be from -2 to 2",
    )?;
    check_field(
        "frequency_penalty",
        in_range(sampling.frequency_penalty, -2.0, 2.0),
        "must be from -2 to 2",
    )?;
    let repetition = above_zero(sampling.repetition_penalty, 2.0);
    check_field(
        "repetition_penalty",
        repetition,
        "must be above 0 and at most 2",
    )?;
    Ok(sampling)
}

/// Moves the logit biases out of the message, sorted by token id.
fn take_logit_bias(
    message: &mut v1::CompletionRequest,
) -> Result<Vec<(TokenId, f32)>, InvalidField> {
    let mut bias: Vec<_> = take(&mut message.logit_bias).into_iter().collect();
    check_field(
        "logit_bias",
        bias.len() <= MAX_LOGIT_BIASES,
        "must have at most 1024 tokens",
    )?;
    check_field(
        "logit_bias",
        bias.iter().all(|(_, bias)| (-100.0..=100.0).contains(bias)),
        "must be from -100 to 100 for each token",
    )?;
    bias.sort_unstable_by_key(|(id, _)| *id);
    Ok(bias)
}

fn take_stop_tokens(message: &mut v1::CompletionRequest) -> Result<StopTokens, InvalidField> {
    let ids = take(&mut message.stop_token_ids);
    check_field(
        "stop_token_ids",
        ids.len() <= MAX_STOP_TOKENS,
        "must have at most 128 ids",
    )?;
    Ok(StopTokens {
        ids: ids.into(),
        ignore_eos: message.ignore_eos,
        min_tokens: message.min_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_reads_the_options_that_the_engine_read_from_the_client() {
        let mut message = v1::CompletionRequest {
            seed: Some(-7),
            temperature: Some(0.5),
            top_p: Some(0.25),
            top_k: Some(3),
            min_p: Some(0.125),
            presence_penalty: Some(1.0),
            frequency_penalty: Some(-1.0),
            repetition_penalty: Some(1.5),
            logit_bias: [(9, -100.0), (7, 100.0)].into(),
            stop_token_ids: vec![4, 5],
            ignore_eos: true,
            min_tokens: 2,
            logprobs: Some(20),
            include_stamps: true,
            user: "somebody".to_owned(),
            cache_salt: "salt".to_owned(),
            ..v1::CompletionRequest::default()
        };
        let sent = message.clone();
        let options = take_options(&mut message).unwrap();
        assert_eq!(options_message(&options), sent);
        let biased: Vec<_> = options.logit_bias.iter().map(|(id, _)| *id).collect();
        assert_eq!(biased, [7, 9], "sorted");
        let mut passed_on = options_message(&options);
        assert_eq!(take_options(&mut passed_on).unwrap(), options);
    }

    #[test]
    fn unset_options_have_openais_defaults() {
        let options = take_options(&mut v1::CompletionRequest::default()).unwrap();
        let defaults = SequenceOptions {
            seed: options.seed,
            ..SequenceOptions::default()
        };
        assert_eq!(options, defaults);
    }
}
