//! The messages of `worker.proto` as the engine's own types, and back. What comes from outside is checked
//! field by field; a worker that breaks a rule is told which.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::token_channel::Failure;
use crate::proto::worker as proto;
use crate::request::{
    Caller, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_TOKENS, MAX_USER_BYTES, Parameter, Sampling,
    StopTokens, TokenId,
};
use crate::runner::{ModelError, ModelFacts, Resumption, Sequence, Token, TokenBytes};
use crate::tokens::{Logprobs, MIN_LOGPROB, TopLogprob};

/// The version of the contract that this program speaks.
pub(super) const PROTOCOL_VERSION: u32 = 1;

/// The largest message, in bytes.
pub(super) const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// The longest text that a worker may tokenize, in bytes: what fits into a message with the rest of it.
const MAX_PROMPT_BYTES: u32 = 4 * 1024 * 1024;

/// The most slots of a worker.
const MAX_SLOTS: u32 = 65_536;

/// The longest name of a runner, or of a worker.
pub(super) const MAX_NAME_BYTES: usize = 64;

/// The longest token, in bytes.
const MAX_TOKEN_BYTES: u32 = 1_024;

/// How far above 0 a log probability may be that a device has rounded.
const ROUNDING: f32 = 0.001;

/// The longest reason or message, in bytes; what is longer is cut.
const MAX_REASON_BYTES: usize = 1_024;

/// The shortest and the longest silence that a worker may declare. The shortest is that of `--heartbeat-timeout`. An
/// hour is well over any compilation of kernels; past it nobody would know a worker that hangs from one that computes.
const HEARTBEAT_TIMEOUTS: RangeInclusive<Duration> =
    Duration::from_millis(100)..=MAX_HEARTBEAT_TIMEOUT;

/// The longest silence that a worker may declare.
pub const MAX_HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3_600);

/// Which rule of the contract was broken.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Violation(pub(super) String);

fn check(holds: bool, rule: &str) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation(rule.to_owned()))
    }
}

/// How a sequence is named between an engine and a worker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SequenceId {
    /// Its number in the worker's stream.
    pub(super) number: u64,
    /// The worker's life, as that counts.
    pub(super) life: u64,
}

/// A sequence as a worker is given it, under this name and with so much credit.
pub(super) fn submit(sequence: &Sequence, named: SequenceId, credit: u32) -> proto::Submit {
    let sampling = &sequence.sampling;
    proto::Submit {
        sequence: named.number,
        life: named.life,
        prompt: sequence.prompt.to_vec(),
        delivered: sequence.delivered.clone(),
        max_tokens: sequence.max_tokens,
        credit,
        sampling: Some(proto::Sampling {
            seed: sequence.seed,
            choice: sequence.choice,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            logit_bias: sequence.logit_bias.iter().copied().collect(),
        }),
        stop_token_ids: sequence.stop_tokens.ids.to_vec(),
        ignore_eos: sequence.stop_tokens.ignore_eos,
        min_tokens: sequence.stop_tokens.min_tokens,
        logprobs: sequence.logprobs,
        scores_prompt: sequence.scores_prompt,
        stamps: sequence.timestamps,
        user: sequence.caller.0.as_deref().unwrap_or_default().to_owned(),
    }
}

/// The sequence that a worker was given.
pub(super) fn sequence(submit: proto::Submit) -> Result<Sequence, Violation> {
    check(!submit.prompt.is_empty(), "submit.prompt must not be empty")?;
    check(submit.credit > 0, "submit.credit must be at least 1")?;
    let top = submit.logprobs.unwrap_or(0);
    check(top <= MAX_LOGPROBS, "submit.logprobs must be at most 20")?;
    let ids = submit.stop_token_ids;
    let rule = "submit.stop_token_ids must be at most 128";
    check(ids.len() <= MAX_STOP_TOKENS, rule)?;
    let rule = "submit.user must be at most 512 bytes";
    check(submit.user.len() <= MAX_USER_BYTES, rule)?;
    let sampling = submit
        .sampling
        .ok_or_else(|| Violation("submit.sampling is missing".to_owned()))?;
    let mut logit_bias: Vec<(TokenId, f32)> = sampling.logit_bias.into_iter().collect();
    let rule = "submit.sampling.logit_bias must be at most 1024 ids";
    check(logit_bias.len() <= MAX_LOGIT_BIASES, rule)?;
    logit_bias.sort_unstable_by_key(|(id, _)| *id);
    Ok(Sequence {
        prompt: submit.prompt.into(),
        delivered: submit.delivered,
        choice: sampling.choice,
        seed: sampling.seed,
        max_tokens: submit.max_tokens,
        sampling: Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
        },
        logit_bias: logit_bias.into(),
        stop_tokens: StopTokens {
            ids: ids.into(),
            ignore_eos: submit.ignore_eos,
            min_tokens: submit.min_tokens,
        },
        logprobs: submit.logprobs,
        scores_prompt: submit.scores_prompt,
        timestamps: submit.stamps,
        caller: Caller(
            Some(submit.user)
                .filter(|user| !user.is_empty())
                .map(Into::into),
        ),
    })
}

/// How large a token is as a part of a step, about, in bytes.
pub(super) fn size(token: &Token) -> usize {
    /// Its numbers, and what is told of lengths.
    const NUMBERS: usize = 32;
    let logprobs = token.logprobs.as_ref().map_or(0, |logprobs| {
        let top = logprobs.top.iter().map(|it| NUMBERS + it.token_bytes.len());
        NUMBERS + logprobs.token_bytes.len() + top.sum::<usize>()
    });
    NUMBERS + token.bytes.len() + logprobs
}

/// Appends a token to what a step made of its sequence.
pub(super) fn push(entry: &mut proto::SequenceStep, token: Token, stamps: bool) {
    entry.ids.push(token.id);
    entry.bytes.extend_from_slice(&token.bytes);
    entry.lengths.push(length(&token.bytes));
    if stamps {
        entry.due_ns.push(token.due_ns);
        entry.emitted_ns.push(token.emitted_ns);
    }
    if let Some(logprobs) = token.logprobs {
        entry.logprobs.push((*logprobs).into());
    }
}

/// Whether a step is of no more sequences than a worker may have; not all of a longer one was kept.
pub(super) fn check_step(step: &proto::Step) -> Result<(), Violation> {
    let rule = "a step has at most 131072 entries";
    check(step.sequences.len() <= proto::MAX_STEP_ENTRIES, rule)
}

/// The tokens that a step made of a sequence, in order, each id of a vocabulary of this size. Those whose emission is
/// not told were emitted `now_ns`.
pub(super) fn tokens(
    entry: &mut proto::SequenceStep,
    vocabulary_size: u32,
    now_ns: u64,
) -> Result<impl ExactSizeIterator<Item = Token> + '_, Violation> {
    let count = entry.ids.len();
    for (list, length, may_be_empty) in [
        ("lengths", entry.lengths.len(), false),
        ("due_ns", entry.due_ns.len(), true),
        ("emitted_ns", entry.emitted_ns.len(), true),
        ("logprobs", entry.logprobs.len(), true),
    ] {
        if length != count && !(may_be_empty && length == 0) {
            let rule = format!("a step's {list} must be as many as its ids, {count}");
            return Err(Violation(rule));
        }
    }
    if let Some(id) = entry.ids.iter().find(|id| *id >= vocabulary_size) {
        return Err(Violation(format!("the vocabulary has no token {id}")));
    }
    let rule = "a token must be at most 1024 bytes";
    check(entry.lengths.iter().all(|it| it <= MAX_TOKEN_BYTES), rule)?;
    let bytes: u64 = entry.lengths.iter().map(u64::from).sum();
    let rule = "a step's lengths must add up to its bytes";
    check(usize::try_from(bytes) == Ok(entry.bytes.len()), rule)?;
    entry.logprobs.iter().try_for_each(check_logprobs)?;
    let mut logprobs = std::mem::take(&mut entry.logprobs).into_iter();
    let entry = &*entry;
    let (mut ids, mut lengths) = (entry.ids.iter(), entry.lengths.iter());
    let mut rest = &entry.bytes[..];
    Ok((0..count).map(move |at| {
        // There are as many of each.
        let id = ids.next().unwrap_or_default();
        let length = lengths.next().unwrap_or_default();
        let (bytes, after) = rest.split_at(usize::try_from(length).unwrap_or(0));
        rest = after;
        Token {
            id,
            bytes: TokenBytes::from_slice(bytes),
            due_ns: entry.due_ns.get(at).copied().unwrap_or(0),
            emitted_ns: told(&entry.emitted_ns, at).unwrap_or(now_ns),
            logprobs: logprobs.next().map(|logprobs| Box::new(logprobs.into())),
        }
    }))
}

/// A time that is told; 0 is none.
fn told(times: &[u64], at: usize) -> Option<u64> {
    times.get(at).copied().filter(|ns| *ns > 0)
}

/// What is told of a token's position must be bounded, and be numbers that JSON has.
fn check_logprobs(logprobs: &proto::Logprobs) -> Result<(), Violation> {
    let limit = usize::try_from(MAX_LOGPROBS).unwrap_or(usize::MAX);
    let rule = "a token has at most 20 of the likeliest beside it";
    check(logprobs.top.len() <= limit, rule)?;
    let is_short = |token_bytes: &[u8]| length(token_bytes) <= MAX_TOKEN_BYTES;
    let is_number = |logprob: f32| (MIN_LOGPROB..=ROUNDING).contains(&logprob);
    let rule = "a log probability is from -9999 to 0, and a token_bytes at most 1024 bytes";
    let is_right = logprobs.logprob.is_none_or(is_number) && is_short(&logprobs.token_bytes);
    let top = &mut logprobs.top.iter();
    check(
        is_right && top.all(|it| is_number(it.logprob) && is_short(&it.token_bytes)),
        rule,
    )
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a token is short")
}

impl From<Logprobs> for proto::Logprobs {
    fn from(logprobs: Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|top| proto::TopLogprob {
            id: top.id,
            token_bytes: top.token_bytes,
            logprob: top.logprob,
        });
        Self {
            logprob: logprobs.logprob,
            token_bytes: logprobs.token_bytes,
            top: top.collect(),
        }
    }
}

impl From<proto::Logprobs> for Logprobs {
    fn from(logprobs: proto::Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|top| TopLogprob {
            id: top.id,
            token_bytes: top.token_bytes,
            logprob: top.logprob,
        });
        Self {
            logprob: logprobs.logprob,
            token_bytes: logprobs.token_bytes,
            top: top.collect(),
        }
    }
}

/// What a worker says of why it gave up a sequence.
pub(super) fn failure(failure: &Failure) -> proto::Failure {
    match failure {
        Failure::Model(error) => of_model(error),
        // The engine has clocks and readers of its own, and asks a worker to end.
        Failure::SlowReader | Failure::DeadlineExceeded | Failure::Draining => proto::Failure {
            is_invalid: false,
            message: "the worker gave it up".to_owned(),
        },
    }
}

/// What a worker says of an input that its model refuses.
pub(super) fn of_model(error: &ModelError) -> proto::Failure {
    let (is_invalid, message) = match error {
        ModelError::Invalid(message) => (true, message),
        ModelError::Failed(message) | ModelError::Unavailable(message) => (false, message),
    };
    proto::Failure {
        is_invalid,
        message: cut(message),
    }
}

/// Why a worker gave up a sequence, or refused an input.
pub(super) fn model_error(failure: Option<proto::Failure>) -> ModelError {
    let proto::Failure {
        is_invalid,
        message,
    } = failure.unwrap_or_default();
    let message = cut(&message);
    if is_invalid {
        ModelError::Invalid(message)
    } else {
        ModelError::Failed(message)
    }
}

/// A reason as it is told: one that is too long is cut, and what would break a log's line is a space.
pub(super) fn cut(reason: &str) -> String {
    let end = reason.floor_char_boundary(MAX_REASON_BYTES);
    reason[..end].replace(char::is_control, " ")
}

/// What a worker says of its model.
pub(super) fn model(facts: &ModelFacts, runner: &str) -> proto::Model {
    let resumption = match facts.resumption {
        Resumption::Exact => proto::Resumption::Exact,
        Resumption::Contiguous => proto::Resumption::Contiguous,
        Resumption::No => proto::Resumption::No,
    };
    let unsupported = facts.unsupported.iter();
    proto::Model {
        runner: runner.to_owned(),
        context_length: facts.context_length,
        max_prompt_bytes: u32::try_from(facts.max_prompt_bytes)
            .unwrap_or(MAX_PROMPT_BYTES)
            .min(MAX_PROMPT_BYTES),
        vocabulary_size: facts.vocabulary_size,
        resumption: resumption.into(),
        unsupported: unsupported.map(|it| it.name().to_owned()).collect(),
        bos_token: facts.bos_token.clone().unwrap_or_default(),
        eos_token: facts.eos_token.clone().unwrap_or_default(),
    }
}

/// What a worker serves, by its own words.
#[derive(Clone, Debug)]
pub(super) struct ReadyReport {
    pub(super) facts: ModelFacts,
    pub(super) runner: String,
    pub(super) slots: usize,
    /// Which life of the worker this is, as that counts.
    pub(super) life: u64,
}

/// The offer of a worker for the model of this name.
pub(super) fn offer(ready: proto::Ready, name: &str) -> Result<ReadyReport, Violation> {
    let rule = "ready.slots must be from 1 to 65536";
    check((1..=MAX_SLOTS).contains(&ready.slots), rule)?;
    check(ready.life > 0, "ready.life must be at least 1")?;
    let model = ready
        .model
        .ok_or_else(|| Violation("ready.model is missing".to_owned()))?;
    check_name("ready.model.runner", &model.runner)?;
    check(!model.runner.is_empty(), "ready.model.runner is missing")?;
    let rule = "ready.model.context_length must be at least 2";
    check(model.context_length >= 2, rule)?;
    let rule = "ready.model.max_prompt_bytes must be from 1 to 4194304";
    check(
        (1..=MAX_PROMPT_BYTES).contains(&model.max_prompt_bytes),
        rule,
    )?;
    let rule = "ready.model.vocabulary_size must be at least 1";
    check(model.vocabulary_size > 0, rule)?;
    let resumption = match model.resumption() {
        proto::Resumption::Exact => Resumption::Exact,
        proto::Resumption::Contiguous => Resumption::Contiguous,
        proto::Resumption::No | proto::Resumption::Unspecified => Resumption::No,
    };
    let unsupported: Result<Vec<_>, _> = model.unsupported.iter().map(parameter).collect();
    let spelled = |token: String| Some(token).filter(|token| !token.is_empty());
    Ok(ReadyReport {
        facts: ModelFacts {
            name: name.to_owned(),
            context_length: model.context_length,
            max_prompt_bytes: usize::try_from(model.max_prompt_bytes).unwrap_or(0),
            vocabulary_size: model.vocabulary_size,
            resumption,
            unsupported: unsupported?,
            bos_token: spelled(model.bos_token),
            eos_token: spelled(model.eos_token),
        },
        runner: model.runner,
        slots: usize::try_from(ready.slots).unwrap_or(usize::MAX),
        life: ready.life,
    })
}

fn parameter(name: &String) -> Result<Parameter, Violation> {
    let known = Parameter::ALL.into_iter().find(|it| it.name() == name);
    known.ok_or_else(|| {
        let names = Parameter::ALL.map(Parameter::name).join(", ");
        Violation(format!(
            "ready.model.unsupported names '{}', which is none of {names}",
            cut(name)
        ))
    })
}

/// How long a worker may be silent, by its `hello`; `None` is as long as the engine says.
///
/// # Errors
/// When it is out of range.
pub(super) fn heartbeat_timeout(hello: &proto::Hello) -> Result<Option<Duration>, Violation> {
    if hello.heartbeat_timeout_ms == 0 {
        return Ok(None);
    }
    let limit = Duration::from_millis(hello.heartbeat_timeout_ms.into());
    if HEARTBEAT_TIMEOUTS.contains(&limit) {
        return Ok(Some(limit));
    }
    Err(Violation(format!(
        "hello.heartbeat_timeout_ms must be 0 or from {} to {}, and is {}",
        HEARTBEAT_TIMEOUTS.start().as_millis(),
        HEARTBEAT_TIMEOUTS.end().as_millis(),
        hello.heartbeat_timeout_ms
    )))
}

/// Whether a name can stand in a log line.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Violation> {
    let is_printable = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let rule = format!("{field} must be at most {MAX_NAME_BYTES} printable ASCII characters");
    check(is_printable && name.len() <= MAX_NAME_BYTES, &rule)
}

/// The bytes of tokens, as an answer holds them.
pub(super) fn pieces(pieces: &[TokenBytes]) -> proto::Pieces {
    proto::Pieces {
        bytes: pieces.concat(),
        lengths: pieces.iter().map(|piece| length(piece)).collect(),
    }
}

/// Whether these are the bytes of so many tokens.
pub(super) fn are_pieces(pieces: &proto::Pieces, count: usize) -> bool {
    let bytes: u64 = pieces.lengths.iter().map(|it| u64::from(*it)).sum();
    pieces.lengths.len() == count && usize::try_from(bytes) == Ok(pieces.bytes.len())
}

/// The bytes of so many tokens.
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
