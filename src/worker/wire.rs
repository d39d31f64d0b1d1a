//! Conversion between the messages of `worker.proto` and the engine's own types. Every field of a received message is
//! checked. A [`Violation`] names the invalid field.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::token_channel::Failure;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::worker as proto;
use crate::request::{MAX_LOGPROBS, Parameter, RequestId};
use crate::runner::{DeviceFacts, ModelError, ModelFacts, Resumption, Sequence, Token, TokenBytes};
use crate::sequence_proto;
use crate::tokens::MIN_LOGPROB;

/// Version of `worker.proto` that this program uses.
pub(super) const PROTOCOL_VERSION: u32 = 2;

/// Maximum size of a message, in bytes.
pub(super) const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// Maximum size of a text that a worker can tokenize, in bytes. The text must fit into one message.
const MAX_PROMPT_BYTES: u32 = 4 * 1024 * 1024;

/// Maximum number of slots of a worker.
const MAX_SLOTS: u32 = 65_536;

/// Maximum length of the name of a runner or a worker, in bytes.
pub(super) const MAX_NAME_BYTES: usize = 64;

/// Maximum size of a token, in bytes.
const MAX_TOKEN_BYTES: u32 = 1_024;

/// Upper limit for a log probability. It is slightly above 0 to allow for rounding errors on the device.
const MAX_LOGPROB: f32 = 0.001;

/// Maximum length of a reason or error message, in bytes. Longer texts are truncated.
const MAX_REASON_BYTES: usize = 1_024;

/// The heartbeat timeouts that a worker may declare in `hello.heartbeat_timeout_ms`. The minimum equals that of
/// `--heartbeat-timeout`.
const HEARTBEAT_TIMEOUTS: RangeInclusive<Duration> =
    Duration::from_millis(100)..=MAX_HEARTBEAT_TIMEOUT;

/// Maximum heartbeat timeout that a worker may declare. An hour is longer than any kernel compilation; a worker that
/// is silent for longer is assumed to hang.
pub(crate) const MAX_HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3_600);

/// A violation of the worker protocol. The text names the field and the rule.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Violation(pub(super) String);

fn check_rule(holds: bool, rule: &str) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation(rule.to_owned()))
    }
}

/// Identifies a sequence between an engine and a worker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SequenceId {
    /// Number of the sequence on the worker's stream.
    pub(super) number: u64,
    /// Generation of the worker, as it reported in `ready.generation`.
    pub(super) generation: u64,
}

/// Converts a sequence to the message that submits it to a worker process.
pub(super) fn submit_message(sequence: &Sequence, id: SequenceId, credit: u32) -> proto::Submit {
    let prompt = v1::TokenIds {
        ids: sequence.prompt.to_vec(),
    };
    proto::Submit {
        sequence: id.number,
        generation: id.generation,
        credit,
        choice: sequence.choice,
        delivered: sequence.delivered.clone(),
        request: Some(v1::CompletionRequest {
            input: Some(Input::PromptTokenIds(prompt)),
            max_tokens: Some(sequence.max_tokens),
            echo: sequence.scores_prompt,
            ..sequence_proto::options_message(&sequence.options)
        }),
        request_id: sequence.request_id.0.to_string(),
    }
}

/// Converts a submission to a sequence, in the worker process.
pub(super) fn sequence_from_submit(submit: proto::Submit) -> Result<Sequence, Violation> {
    let missing = |field| Violation(format!("submit.{field} is missing"));
    check_rule(submit.credit > 0, "submit.credit must be at least 1")?;
    let mut request = submit.request.ok_or_else(|| missing("request"))?;
    let Some(Input::PromptTokenIds(v1::TokenIds { ids: prompt })) = request.input.take() else {
        return Err(missing("request.prompt_token_ids"));
    };
    let rule = "submit.request.prompt_token_ids must contain at least one id";
    check_rule(!prompt.is_empty(), rule)?;
    let max_tokens = request.max_tokens;
    let max_tokens = max_tokens.ok_or_else(|| missing("request.max_tokens"))?;
    // The client knows the seed. A random seed chosen here would differ.
    request.seed.ok_or_else(|| missing("request.seed"))?;
    let options = sequence_proto::take_options(&mut request);
    Ok(Sequence {
        request_id: request_id(&submit.request_id)?,
        prompt: prompt.into(),
        delivered: submit.delivered,
        choice: submit.choice,
        max_tokens,
        scores_prompt: request.echo,
        options: options.map_err(|invalid| Violation(format!("submit.request.{invalid}")))?,
    })
}

/// Checks the id of a request. A missing id is replaced by a random one.
fn request_id(id: &str) -> Result<RequestId, Violation> {
    if id.is_empty() {
        return Ok(RequestId::random());
    }
    RequestId::parse(id).ok_or_else(|| {
        let rule = "submit.request_id must have at most 128 visible ASCII characters";
        Violation(rule.to_owned())
    })
}

/// Approximate size of a token in a step message, in bytes.
pub(super) fn token_size(token: &Token) -> usize {
    /// Size of a token's numbers and length prefixes.
    const FIXED_BYTES: usize = 32;
    let logprobs = token.logprobs.as_ref().map_or(0, |logprobs| {
        let top = logprobs
            .top
            .iter()
            .map(|it| FIXED_BYTES + it.token_bytes.len());
        FIXED_BYTES + logprobs.token_bytes.len() + top.sum::<usize>()
    });
    FIXED_BYTES + token.bytes.len() + logprobs
}

/// Appends a token to its sequence's entry in a step message.
pub(super) fn push_token(entry: &mut proto::SequenceStep, token: Token, timestamps: bool) {
    entry.ids.push(token.id);
    entry.bytes.extend_from_slice(&token.bytes);
    entry.lengths.push(length(&token.bytes));
    if timestamps {
        entry.due_ns.push(token.due_ns);
        entry.emitted_ns.push(token.emitted_ns);
    }
    if let Some(logprobs) = token.logprobs {
        entry.logprobs.push((*logprobs).into());
    }
}

/// Checks the number of entries in a step. The decoder has already dropped most entries above the limit.
pub(super) fn check_step(step: &proto::Step) -> Result<(), Violation> {
    let rule = "step.sequences must have at most 131072 entries";
    check_rule(step.sequences.len() <= proto::MAX_STEP_ENTRIES, rule)
}

/// Decodes the tokens of one step entry, in order. Token ids must be below `vocabulary_size`. A token without an
/// emission time gets `now_ns`.
pub(super) fn decode_tokens(
    entry: &mut proto::SequenceStep,
    vocabulary_size: u32,
    now_ns: u64,
) -> Result<impl ExactSizeIterator<Item = Token> + '_, Violation> {
    let count = entry.ids.len();
    for (field, length, may_be_empty) in [
        ("lengths", entry.lengths.len(), false),
        ("due_ns", entry.due_ns.len(), true),
        ("emitted_ns", entry.emitted_ns.len(), true),
        ("logprobs", entry.logprobs.len(), true),
    ] {
        if length != count && !(may_be_empty && length == 0) {
            return Err(Violation(format!(
                "step.sequences.{field} must have as many entries as ids (got {length} and {count})"
            )));
        }
    }
    if let Some(id) = entry.ids.iter().find(|id| *id >= vocabulary_size) {
        return Err(Violation(format!(
            "step.sequences.ids must be below the vocabulary size {vocabulary_size} (got {id})"
        )));
    }
    let rule = "step.sequences.lengths must be at most 1024 bytes each";
    check_rule(entry.lengths.iter().all(|it| it <= MAX_TOKEN_BYTES), rule)?;
    let bytes: u64 = entry.lengths.iter().map(u64::from).sum();
    let rule = "step.sequences.lengths must add up to the length of bytes";
    check_rule(usize::try_from(bytes) == Ok(entry.bytes.len()), rule)?;
    entry.logprobs.iter().try_for_each(check_logprobs)?;
    let mut logprobs = std::mem::take(&mut entry.logprobs).into_iter();
    let entry = &*entry;
    let (mut ids, mut lengths) = (entry.ids.iter(), entry.lengths.iter());
    let mut rest = &entry.bytes[..];
    Ok((0..count).map(move |at| {
        // All lists have the same length, as checked above.
        let id = ids.next().unwrap_or_default();
        let length = lengths.next().unwrap_or_default();
        let (bytes, after) = rest.split_at(usize::try_from(length).unwrap_or(0));
        rest = after;
        Token {
            id,
            bytes: TokenBytes::from_slice(bytes),
            due_ns: entry.due_ns.get(at).copied().unwrap_or(0),
            emitted_ns: known_time(&entry.emitted_ns, at).unwrap_or(now_ns),
            logprobs: logprobs.next().map(|logprobs| Box::new(logprobs.into())),
        }
    }))
}

/// Returns the time at this index, or `None` if it is missing or 0.
fn known_time(times: &[u64], at: usize) -> Option<u64> {
    times.get(at).copied().filter(|ns| *ns > 0)
}

/// Checks log probabilities: their number and size are bounded, and they are finite, because JSON has no other
/// numbers.
fn check_logprobs(logprobs: &v1::Logprobs) -> Result<(), Violation> {
    let limit = usize::try_from(MAX_LOGPROBS).unwrap_or(usize::MAX);
    let rule = "step.sequences.logprobs.top must have at most 20 tokens";
    check_rule(logprobs.top.len() <= limit, rule)?;
    let is_short = |token_bytes: &[u8]| length(token_bytes) <= MAX_TOKEN_BYTES;
    let is_in_range = |logprob: f32| (MIN_LOGPROB..=MAX_LOGPROB).contains(&logprob);
    let rule =
        "step.sequences.logprobs must be from -9999 to 0, and token_bytes at most 1024 bytes";
    let is_valid = logprobs.logprob.is_none_or(is_in_range) && is_short(&logprobs.token_bytes);
    let top = &mut logprobs.top.iter();
    check_rule(
        is_valid && top.all(|it| is_in_range(it.logprob) && is_short(&it.token_bytes)),
        rule,
    )
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a token has at most 1024 bytes")
}

/// Converts the failure of a sequence, in the worker process.
pub(super) fn failure_message(failure: &Failure) -> proto::Failure {
    match failure {
        Failure::Model(error) => model_failure_message(error),
        // The engine checks deadlines and readers itself, and it decides when a worker drains and which sequence is
        // displaced. It therefore already knows these reasons.
        Failure::SlowReader
        | Failure::DeadlineExceeded
        | Failure::Draining
        | Failure::Displaced => proto::Failure {
            is_invalid: false,
            message: "the worker ended the sequence".to_owned(),
        },
    }
}

/// Converts a model's error, in the worker process.
pub(super) fn model_failure_message(error: &ModelError) -> proto::Failure {
    let (is_invalid, message) = match error {
        ModelError::Invalid(message) => (true, message),
        ModelError::Failed(message) | ModelError::Unavailable(message) => (false, message),
    };
    proto::Failure {
        is_invalid,
        message: sanitize(message),
    }
}

/// Converts a worker's failure message to a [`ModelError`]. Used in the engine.
pub(super) fn model_error(failure: Option<proto::Failure>) -> ModelError {
    let proto::Failure {
        is_invalid,
        message,
    } = failure.unwrap_or_default();
    let message = sanitize(&message);
    if is_invalid {
        ModelError::Invalid(message)
    } else {
        ModelError::Failed(message)
    }
}

/// Truncates a reason and replaces its control characters by spaces, so that it fits on one log line.
pub(super) fn sanitize(reason: &str) -> String {
    let end = reason.floor_char_boundary(MAX_REASON_BYTES);
    reason[..end].replace(char::is_control, " ")
}

/// Converts a model's facts, in the worker process.
pub(super) fn model_message(facts: &ModelFacts, runner: &str) -> proto::Model {
    let resumption = match facts.resumption {
        Resumption::Exact => proto::Resumption::Exact,
        Resumption::Contiguous => proto::Resumption::Contiguous,
        Resumption::No => proto::Resumption::No,
    };
    let unsupported = facts.unsupported.iter();
    let device = facts.device.as_ref();
    proto::Model {
        runner: runner.to_owned(),
        context_length: facts.context_length,
        max_prompt_bytes: u32::try_from(facts.max_prompt_bytes)
            .unwrap_or(MAX_PROMPT_BYTES)
            .min(MAX_PROMPT_BYTES),
        vocabulary_size: facts.vocabulary_size,
        resumption: resumption.into(),
        reuses_prefixes: facts.reuses_prefixes,
        device: device.map_or_else(String::new, |device| sanitize(&device.name)),
        slot_bytes: device.map_or(0, |device| device.slot_bytes),
        unsupported: unsupported.map(|it| it.name().to_owned()).collect(),
        bos_token: facts.bos_token.clone().unwrap_or_default(),
        eos_token: facts.eos_token.clone().unwrap_or_default(),
    }
}

/// The contents of a worker's `ready` message, which have been checked.
#[derive(Clone, Debug)]
pub(super) struct ReadyReport {
    pub(super) facts: ModelFacts,
    pub(super) runner: String,
    pub(super) slots: usize,
    /// Generation of the worker, from `ready.generation`.
    pub(super) generation: u64,
}

/// Checks a worker's `ready` message. `name` is the engine's name of the model.
pub(super) fn ready_report(ready: proto::Ready, name: &str) -> Result<ReadyReport, Violation> {
    let rule = "ready.slots must be from 1 to 65536";
    check_rule((1..=MAX_SLOTS).contains(&ready.slots), rule)?;
    check_rule(ready.generation > 0, "ready.generation must be at least 1")?;
    let model = ready
        .model
        .ok_or_else(|| Violation("ready.model is missing".to_owned()))?;
    check_name("ready.model.runner", &model.runner)?;
    check_rule(!model.runner.is_empty(), "ready.model.runner is missing")?;
    let rule = "ready.model.context_length must be at least 2";
    check_rule(model.context_length >= 2, rule)?;
    let rule = "ready.model.max_prompt_bytes must be from 1 to 4194304";
    check_rule(
        (1..=MAX_PROMPT_BYTES).contains(&model.max_prompt_bytes),
        rule,
    )?;
    let rule = "ready.model.vocabulary_size must be at least 1";
    check_rule(model.vocabulary_size > 0, rule)?;
    let resumption = match model.resumption() {
        proto::Resumption::Exact => Resumption::Exact,
        proto::Resumption::Contiguous => Resumption::Contiguous,
        proto::Resumption::No | proto::Resumption::Unspecified => Resumption::No,
    };
    let unsupported: Result<Vec<_>, _> = model.unsupported.iter().map(parse_parameter).collect();
    let non_empty = |token: String| Some(token).filter(|token| !token.is_empty());
    Ok(ReadyReport {
        facts: ModelFacts {
            name: name.to_owned(),
            context_length: model.context_length,
            max_prompt_bytes: usize::try_from(model.max_prompt_bytes).unwrap_or(0),
            vocabulary_size: model.vocabulary_size,
            resumption,
            reuses_prefixes: model.reuses_prefixes,
            device: non_empty(sanitize(&model.device)).map(|name| DeviceFacts {
                name,
                slot_bytes: model.slot_bytes,
            }),
            unsupported: unsupported?,
            bos_token: non_empty(model.bos_token),
            eos_token: non_empty(model.eos_token),
        },
        runner: model.runner,
        slots: usize::try_from(ready.slots).unwrap_or(usize::MAX),
        generation: ready.generation,
    })
}

fn parse_parameter(name: &String) -> Result<Parameter, Violation> {
    let known = Parameter::ALL.into_iter().find(|it| it.name() == name);
    known.ok_or_else(|| {
        let names = Parameter::ALL.map(Parameter::name).join(", ");
        Violation(format!(
            "ready.model.unsupported must only contain {names} (got '{}')",
            sanitize(name)
        ))
    })
}

/// Returns the heartbeat timeout that a worker declares in its `hello`. `None` selects the engine's own timeout.
///
/// # Errors
/// Returns an error if the timeout is out of range.
pub(super) fn heartbeat_timeout(hello: &proto::Hello) -> Result<Option<Duration>, Violation> {
    if hello.heartbeat_timeout_ms == 0 {
        return Ok(None);
    }
    let timeout = Duration::from_millis(hello.heartbeat_timeout_ms.into());
    if HEARTBEAT_TIMEOUTS.contains(&timeout) {
        return Ok(Some(timeout));
    }
    Err(Violation(format!(
        "hello.heartbeat_timeout_ms must be 0 or from {} to {} (got {})",
        HEARTBEAT_TIMEOUTS.start().as_millis(),
        HEARTBEAT_TIMEOUTS.end().as_millis(),
        hello.heartbeat_timeout_ms
    )))
}

/// Checks that a name fits on a log line.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Violation> {
    let is_printable = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let rule = format!("{field} must have at most {MAX_NAME_BYTES} printable ASCII characters");
    check_rule(is_printable && name.len() <= MAX_NAME_BYTES, &rule)
}

/// Converts the bytes of tokens to the message `Pieces`.
pub(super) fn pieces_message(pieces: &[TokenBytes]) -> proto::Pieces {
    proto::Pieces {
        bytes: pieces.concat(),
        lengths: pieces.iter().map(|piece| length(piece)).collect(),
    }
}

/// Returns true if the message contains the bytes of exactly `count` tokens.
pub(super) fn has_pieces(pieces: &proto::Pieces, count: usize) -> bool {
    let bytes: u64 = pieces.lengths.iter().map(|it| u64::from(*it)).sum();
    pieces.lengths.len() == count && usize::try_from(bytes) == Ok(pieces.bytes.len())
}

/// Splits the message into the bytes of `count` tokens. Returns `None` if it does not match.
pub(super) fn token_bytes(pieces: &proto::Pieces, count: usize) -> Option<Vec<TokenBytes>> {
    let mut rest = &pieces.bytes[..];
    let mut all = Vec::with_capacity(count);
    for length in &pieces.lengths {
        let (bytes, after) = rest.split_at_checked(usize::try_from(*length).ok()?)?;
        all.push(TokenBytes::from_slice(bytes));
        rest = after;
    }
    (all.len() == count && rest.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests;
