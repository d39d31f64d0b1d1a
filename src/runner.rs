//! The interface between a worker and the code that runs a model on a device. This module knows sequences and tokens.
//! It must not know requests, streams, queues or protocols.
//!
//! A [`Runner`] is synchronous and stays on its worker's thread, because device calls block. A [`Model`] has the
//! parts that all threads share: facts, tokenizer and chat template.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::request::{ChatMessage, Parameter, RequestId, SequenceOptions, TokenId};
use crate::tokens::Logprobs;

#[cfg(feature = "llama-cpp")]
pub mod llama;
/// The parts of the runner `llama` that read untrusted bytes. They do without llama.cpp, so the fuzz targets do, too.
#[cfg(all(feature = "fuzzing", not(feature = "llama-cpp")))]
#[expect(dead_code, reason = "the runner uses the other items")]
pub(crate) mod llama {
    mod chat;
    pub(crate) mod fuzzing;
    mod gguf;
}
pub mod llm_test;

/// The raw bytes of a token, which may end in the middle of a UTF-8 character. Up to 16 bytes need
/// no allocation.
pub type TokenBytes = SmallVec<[u8; 16]>;

/// A worker's capacity for one sequence: an index from 0 to the worker's number of slots minus 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// A model that has been loaded onto a device.
pub struct LoadedModel {
    /// The parts that all threads share.
    pub model: Arc<dyn Model>,
    /// Runs the model on the device. It never leaves the worker's thread.
    pub runner: Box<dyn Runner>,
}

/// Loads a model on the worker's thread: when the worker starts, and again after a crash.
pub trait Loader: Send + Sync {
    /// Loads the model. Calls `progress` with the fraction that is loaded, from 0 to 1.
    ///
    /// # Errors
    /// Returns the reason why the model cannot be loaded. The text must let an operator fix the problem.
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError>;

    /// The value of `--runner` that selects this kind of runner, such as `llm_test`.
    fn name(&self) -> &'static str;
}

/// The parts of a model that any thread may use: facts, tokenizer and chat template.
pub trait Model: Send + Sync {
    /// The model's properties.
    fn facts(&self) -> &ModelFacts;

    /// Turns text into token ids. The caller has checked that the text is at most
    /// [`ModelFacts::max_prompt_bytes`] long.
    ///
    /// # Errors
    /// The text cannot be tokenized.
    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError>;

    /// Builds the fill-in-the-middle prompt for the gap between two texts. The caller has checked
    /// their total length. A model without this ability lists [`Parameter::Suffix`] as unsupported,
    /// and this method is not called.
    ///
    /// # Errors
    /// A text cannot be tokenized, or the model has no fill-in-the-middle tokens.
    fn tokenize_infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        let _ = (prefix, suffix);
        let message = "This model has no fill-in-the-middle tokens.";
        Err(ModelError::Invalid(message.to_owned()))
    }

    /// Returns the bytes of each token. Every id is below [`ModelFacts::vocabulary_size`].
    ///
    /// # Errors
    /// The model cannot decode the tokens.
    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError>;

    /// Renders messages into a prompt with the model's chat template.
    ///
    /// # Errors
    /// The model has no template, or its template rejects the messages.
    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError>;

    /// Returns true if the methods above take microseconds for short input. They may then run on an async thread.
    /// Otherwise they always run on a blocking thread.
    fn tokenizes_inline(&self) -> bool {
        true
    }
}

/// The properties of a model.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// Name of the model, from the model file or the runner. The server's settings may override it.
    pub name: String,
    /// Maximum number of tokens in one sequence: prompt plus completion.
    pub context_length: u32,
    /// Maximum length of a prompt, in bytes. A longer prompt is rejected without being tokenized.
    pub max_prompt_bytes: usize,
    /// Number of tokens in the vocabulary. Valid token ids are lower.
    pub vocabulary_size: u32,
    /// Guarantee for a sequence that is resumed on another worker.
    pub resumption: Resumption,
    /// True if a new sequence can start from tokens that an earlier sequence on the same device has computed. The
    /// scheduler then prefers the worker that has computed the longest part of a prompt.
    pub reuses_prefixes: bool,
    /// The device that runs the model. `None` if the runner does not say.
    pub device: Option<DeviceFacts>,
    /// Parameters that the runner does not support. A request that uses such a parameter is rejected.
    pub unsupported: Vec<Parameter>,
    /// Text of the token that begins every prompt (BOS), if the model adds one.
    pub bos_token: Option<String>,
    /// Text of the token that ends the model's output (EOS), if the model has one.
    pub eos_token: Option<String>,
}

/// The device that runs a model, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The device in words, such as `CUDA0 (NVIDIA H200), all layers`.
    pub name: String,
    /// Memory in bytes that a slot takes on the device. 0 if it is unknown.
    pub slot_bytes: u64,
}

/// Controls the beginning-of-sequence (BOS) token at the start of a tokenized text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BosPolicy {
    /// Add the BOS token, if the model has one.
    Add,
    /// Tokenize the text alone.
    Omit,
}

/// Guarantee for a sequence that is resumed on another worker, from its prompt and its tokens so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumption {
    /// The remaining tokens are the same as without the interruption.
    Exact,
    /// No token is lost or repeated, but the remaining tokens may differ.
    Contiguous,
    /// A sequence cannot be resumed.
    No,
}

/// One choice of a request, in the form that a device runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Id of the request, for log lines.
    pub request_id: RequestId,
    /// The prompt's token ids, shared by the choices of a request.
    pub prompt: Arc<[TokenId]>,
    /// Completion tokens that the client already has. Sampling continues after them.
    pub delivered: Vec<TokenId>,
    /// Index of this choice in its request, from 0.
    pub choice: u32,
    /// Maximum number of completion tokens, including those that the client already has. 0 only if the request asks
    /// for nothing but the prompt's log probabilities.
    pub max_tokens: u32,
    /// True if the device must emit the prompt's tokens with their log probabilities before the completion's tokens.
    pub scores_prompt: bool,
    /// Options that all choices of the request share, such as the sampling parameters.
    pub options: SequenceOptions,
}

impl Sequence {
    /// Creates the sequence for choice 0 of a new request, with a random request id and default options.
    #[must_use]
    pub fn new(prompt: impl Into<Arc<[TokenId]>>, max_tokens: u32) -> Self {
        Self {
            request_id: RequestId::random(),
            prompt: prompt.into(),
            delivered: Vec::new(),
            choice: 0,
            max_tokens,
            scores_prompt: false,
            options: SequenceOptions::default(),
        }
    }
}

/// A token that a device has generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Index in the vocabulary.
    pub id: TokenId,
    /// Text of the token; empty for a special token.
    pub bytes: TokenBytes,
    /// Scheduled emission time in nanoseconds of CLOCK_MONOTONIC. 0 from a runner without a schedule.
    pub due_ns: u64,
    /// Actual emission time in nanoseconds of CLOCK_MONOTONIC. If it is 0, the worker sets it.
    pub emitted_ns: u64,
    /// Log probabilities, if the sequence asks for them.
    pub logprobs: Option<Box<Logprobs>>,
}

/// The result of [`Runner::admit`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceStart {
    /// Number of tokens at the start of the prompt that the sequence is expected to reuse. At most the length of the
    /// prompt. Another running sequence may still have to compute some of them. If that sequence is cancelled, the
    /// number is too high.
    pub cached_tokens: u32,
}

/// The state of a device's prefix cache: the computed tokens that it keeps after their sequences have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCacheStats {
    /// Memory in bytes that the device uses for computed tokens outside its slots. 0 if it keeps them only in slots.
    pub bytes: u64,
    /// Number of sequences whose computed tokens were dropped to make room, since the model was loaded.
    pub evictions: u64,
}

/// A device that computes the tokens of several sequences, step by step.
///
/// A device may keep the computed tokens of a sequence after the sequence has ended, and start a new sequence from
/// them. The model then declares [`ModelFacts::reuses_prefixes`]. [`Runner::choose_slot`] chooses the slot, and
/// [`Runner::admit`] returns the number of reused tokens. Sequences with different [`SequenceOptions::cache_salt`] must
/// not share tokens. Reuse must not change a sequence's tokens if the model declares [`Resumption::Exact`].
///
/// The worker calls `next_step`, and then `step` at the time that `next_step` returned. Between steps the worker admits
/// and releases sequences. If the runner panics, the worker catches the panic, gives up all sequences of the device and
/// loads the model again.
pub trait Runner {
    /// Chooses the slot of the next sequence. `free` lists the free slots. It is not empty, and its last slot is the
    /// most recently freed. The worker then calls [`Runner::admit`] with the chosen slot. The default implementation
    /// chooses the last one.
    fn choose_slot(&self, sequence: &Sequence, free: &[Slot]) -> Slot {
        let _ = sequence;
        *free.last().expect("at least one slot is free")
    }

    /// Adds a sequence to a free slot. The prompt has at least one token, and the prompt plus `max_tokens` fits the
    /// context.
    ///
    /// # Errors
    /// The device cannot run this sequence. Other sequences continue.
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError>;

    /// Drops the sequence in a slot, because the sequence has ended or its client is gone.
    fn release(&mut self, slot: Slot);

    /// Returns the time of the device's next step.
    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep;

    /// Runs one step: part of a prefill, one or more tokens for some sequences, or both.
    ///
    /// # Errors
    /// The device has failed. The worker gives up all its sequences and loads the model again.
    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError>;

    /// Returns the state of the prefix cache, for the metrics. The worker calls it after every admission and release.
    fn prefix_cache(&self) -> PrefixCacheStats {
        PrefixCacheStats::default()
    }
}

/// Time at which a device's next step must run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextStep {
    /// The step must run now.
    Now,
    /// The step must not run before this time, in nanoseconds of CLOCK_MONOTONIC.
    At(u64),
    /// No step is needed until a sequence is admitted, or a sequence without credit gets credit.
    Idle,
}

/// Flow control: the number of tokens that each sequence may emit before its reader must catch up.
pub trait SlotCredit {
    /// Number of tokens that the sequence in this slot may emit now. If it is 0, the runner must skip the sequence.
    fn credit(&self, slot: Slot) -> usize;
}

/// One step of a device: the credit of the sequences, and the tokens that the step emits.
pub struct Step<'a> {
    credit: &'a dyn SlotCredit,
    emissions: &'a mut Vec<Emission>,
}

/// An event that a step emits for one slot.
#[derive(Clone, Debug, PartialEq)]
pub enum Emission {
    /// The next token of the slot's sequence.
    Token(Slot, Token),
    /// The next token of the prompt, with its log probabilities.
    Prompt(Slot, Token),
    /// The sequence's last token: a stop token, or the end-of-sequence token, which has no bytes.
    EndOfSequence(Slot, Token),
    /// This sequence failed. The device and its other sequences continue.
    Failed(Slot, ModelError),
}

impl<'a> Step<'a> {
    /// Creates a step that appends to `emissions`.
    pub fn new(credit: &'a dyn SlotCredit, emissions: &'a mut Vec<Emission>) -> Self {
        Self { credit, emissions }
    }

    /// Returns the number of tokens that the sequence in this slot may emit in this step. The number stays the same
    /// while the step emits tokens.
    #[must_use]
    pub fn credit(&self, slot: Slot) -> usize {
        self.credit.credit(slot)
    }

    /// Emits the next token of a sequence. After `max_tokens` tokens the worker releases the slot.
    pub fn emit(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::Token(slot, token));
    }

    /// Emits the next token of a prompt, with its log probabilities. Used only for [`Sequence::scores_prompt`]. A
    /// prompt token uses credit like any other token. If `max_tokens` is 0, the worker releases the slot after the
    /// last prompt token.
    pub(crate) fn emit_prompt(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::Prompt(slot, token));
    }

    /// Ends a sequence with its end-of-sequence token or a stop token. The worker then releases the slot.
    pub fn end(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::EndOfSequence(slot, token));
    }

    /// Emits an event that was created earlier.
    pub fn push(&mut self, emission: Emission) {
        self.emissions.push(emission);
    }

    /// Ends one sequence with an error. The worker then releases the slot.
    pub fn fail(&mut self, slot: Slot, error: ModelError) {
        self.emissions.push(Emission::Failed(slot, error));
    }
}

/// Reason why a model could not be loaded, as a text for the operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(pub String);

/// Reason why a model rejected an input or failed on a sequence, as a text for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The input is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The model failed on a valid input.
    #[error("{0}")]
    Failed(String),
    /// No connected worker can answer.
    #[error("{0}")]
    Unavailable(String),
}

/// Reason why a device failed, as a text for the operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StepError(pub String);

/// The current time in nanoseconds of CLOCK_MONOTONIC, the clock of all token timestamps.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since_boot = Duration::new(
        u64::try_from(now.tv_sec).expect("CLOCK_MONOTONIC is never negative"),
        u32::try_from(now.tv_nsec).expect("tv_nsec is below one billion"),
    );
    u64::try_from(since_boot.as_nanos()).expect("the uptime is below 584 years")
}
