//! What runs a model on a device. It knows sequences and tokens; it must not know requests, streams,
//! queues or protocols.
//!
//! A runner is synchronous and lives on its worker's own thread, because device calls block. What
//! other threads need of the model (its facts, its tokenizer, its chat template) is a [`Model`],
//! which they share.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::request::{Caller, ChatMessage, Parameter, Sampling, StopTokens, TokenId};
use crate::tokens::Logprobs;

#[cfg(feature = "llama-cpp")]
pub mod llama;
pub mod llm_test;

/// The raw bytes of a token: not always whole characters. Up to 16 bytes need no allocation.
pub type TokenBytes = SmallVec<[u8; 16]>;

/// A place for one sequence on a device, from 0 up to the worker's number of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// A model loaded onto a device, and the part of it that every thread may use.
pub struct LoadedModel {
    /// Facts, tokenizer and template.
    pub model: Arc<dyn Model>,
    /// The device.
    pub runner: Box<dyn Runner>,
}

/// Loads a model. It runs on the worker's thread, and runs again there after a crash.
pub trait Loader: Send + Sync {
    /// Loads the model, telling its progress as a fraction from 0 to 1.
    ///
    /// # Errors
    /// What keeps the model from loading, said so that an operator can mend it.
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError>;

    /// The name by which this kind of runner is chosen, such as `llm_test`.
    fn name(&self) -> &'static str;
}

/// What every thread may ask of a model.
pub trait Model: Send + Sync {
    /// What the model is and can.
    fn facts(&self) -> &ModelFacts;

    /// Turns text into token ids. The caller has capped the text by
    /// [`ModelFacts::max_prompt_bytes`].
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError>;

    /// The prompt that asks the model to fill the gap between two texts, which the caller has capped
    /// together. A model that cannot says so by [`Parameter::Suffix`], and is not asked.
    ///
    /// # Errors
    /// When a text cannot be tokenized, or the model has no tokens for it.
    fn infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        let _ = (prefix, suffix);
        let message = "This model has no fill-in-the-middle tokens.";
        Err(ModelError::Invalid(message.to_owned()))
    }

    /// The bytes of tokens, each of which is in the vocabulary: below [`ModelFacts::vocabulary_size`].
    ///
    /// # Errors
    /// When they cannot be told.
    fn pieces(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError>;

    /// Renders messages into a prompt by the model's chat template.
    ///
    /// # Errors
    /// When the model has no template, or its template refuses the messages.
    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError>;

    /// Whether a short input is answered in microseconds. Where it is not, the model is always asked on a
    /// thread that may wait.
    fn tokenizes_inline(&self) -> bool {
        true
    }
}

/// What a model is and can.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// The name that the model gives itself; the server's settings may choose another.
    pub name: String,
    /// The most tokens of one sequence, prompt and completion together.
    pub context_length: u32,
    /// The longest prompt that is tokenized at all, in bytes.
    pub max_prompt_bytes: usize,
    /// Every id below this is a token.
    pub vocabulary_size: u32,
    /// How well a sequence goes on elsewhere after its device was lost.
    pub resumption: Resumption,
    /// What the runner cannot honour: a request that needs any of it is refused.
    pub unsupported: Vec<Parameter>,
    /// How the token is spelled with which the model begins every prompt, where it has one.
    pub bos_token: Option<String>,
    /// How the token is spelled by which the model ends its output, where it has one.
    pub eos_token: Option<String>,
}

/// What a tokenized text begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BosPolicy {
    /// The token with which the model begins every prompt, where it has one.
    Add,
    /// The text itself.
    Omit,
}

/// How well a sequence goes on elsewhere, from its prompt and the tokens made so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumption {
    /// The tokens are those that an undisturbed run would have made.
    Exact,
    /// No token is lost or repeated, but the continuation may differ.
    Contiguous,
    /// It cannot go on.
    No,
}

/// One choice of one request, as a device sees it.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The prompt's token ids, shared by the choices of a request.
    pub prompt: Arc<[TokenId]>,
    /// The tokens that its client already has: generation goes on at the next index.
    pub delivered: Vec<TokenId>,
    /// Which choice of its request this is, from 0.
    pub choice: u32,
    /// Seeds the sampling, with the choice and the position.
    pub seed: u64,
    /// The most tokens, with those already delivered; 0 only where the prompt's log probabilities are all
    /// that is asked for.
    pub max_tokens: u32,
    /// How to sample.
    pub sampling: Sampling,
    /// What is added to the logits of these tokens before sampling.
    pub logit_bias: Arc<[(TokenId, f32)]>,
    /// Which tokens end it.
    pub stop_tokens: StopTokens,
    /// With how many of the likeliest tokens each token is told; `None` for no log probabilities at all.
    pub logprobs: Option<u32>,
    /// Whether the prompt's own tokens are emitted too, each with its log probabilities, before the first
    /// of the completion.
    pub scores_prompt: bool,
    /// Whether the client asked for the times of deadline and emission.
    pub timestamps: bool,
    /// Who asked.
    pub caller: Caller,
}

/// A token as a device made it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// Its bytes.
    pub bytes: TokenBytes,
    /// When it was due, in nanoseconds of CLOCK_MONOTONIC; 0 from a runner with no schedule.
    pub due_ns: u64,
    /// When it was emitted, in nanoseconds of CLOCK_MONOTONIC; 0 lets the worker stamp it.
    pub emitted_ns: u64,
    /// How likely it was, where its sequence asks.
    pub logprobs: Option<Box<Logprobs>>,
}

/// What a device does, one step at a time.
///
/// The worker calls `next` and then, when it says so, `step`. Between steps it admits and releases
/// sequences. A panic is contained by the worker: every sequence of the device is lost, and the
/// model is loaded again.
pub trait Runner {
    /// Takes a sequence into a free slot. Its prompt fits: at least one token, and prompt and
    /// `max_tokens` together within the context.
    ///
    /// # Errors
    /// When this device cannot run this sequence; the others go on.
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError>;

    /// Forgets the sequence in a slot: it has ended, or nobody waits for it any more.
    fn release(&mut self, slot: Slot);

    /// When the device has something to do next.
    fn next(&mut self, credit: &dyn SlotCredit) -> Next;

    /// Does what is to be done now: part of a prefill, a token for some of the sequences, or both.
    ///
    /// # Errors
    /// When the device has failed: all its sequences are lost and the model is loaded again.
    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError>;
}

/// When a device has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once.
    Now,
    /// Not before this time, in nanoseconds of CLOCK_MONOTONIC.
    At(u64),
    /// Not until a sequence comes, or one without credit gets some.
    Idle,
}

/// How far each sequence may run ahead of its reader.
pub trait SlotCredit {
    /// How many more tokens the sequence in this slot may emit now. At 0 the runner must pass it over.
    fn credit(&self, slot: Slot) -> usize;
}

/// One step of a device: which sequences may go on, and what came of it.
pub struct Step<'a> {
    credit: &'a dyn SlotCredit,
    emissions: &'a mut Vec<Emission>,
}

/// What a step made for one slot.
#[derive(Clone, Debug, PartialEq)]
pub enum Emission {
    /// The next token of the slot's sequence.
    Token(Slot, Token),
    /// The next token of the sequence's prompt, with its log probabilities.
    Prompt(Slot, Token),
    /// The sequence's last token: an end of sequence, which has no bytes, or a stop token.
    EndOfSequence(Slot, Token),
    /// This sequence failed; the device and its other sequences go on.
    Failed(Slot, ModelError),
}

impl<'a> Step<'a> {
    /// A step that reads credit from `credit` and collects into `emissions`.
    pub fn new(credit: &'a dyn SlotCredit, emissions: &'a mut Vec<Emission>) -> Self {
        Self { credit, emissions }
    }

    /// How many more tokens the sequence in this slot may emit in this step, before any of them.
    #[must_use]
    pub fn credit(&self, slot: Slot) -> usize {
        self.credit.credit(slot)
    }

    /// Emits the next token of a sequence. The worker ends the sequence after `max_tokens` of them,
    /// and then releases the slot.
    pub fn emit(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::Token(slot, token));
    }

    /// Emits the next token of a prompt, where [`Sequence::scores_prompt`] asks for it. It takes credit as
    /// any other. After the last of them a sequence of no tokens ends, and the worker releases the slot.
    pub fn prompt(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::Prompt(slot, token));
    }

    /// Emits a sequence's end-of-sequence or stop token; the worker then releases the slot.
    pub fn end(&mut self, slot: Slot, token: Token) {
        self.emissions.push(Emission::EndOfSequence(slot, token));
    }

    /// Ends one sequence with an error; the worker then releases the slot.
    pub fn fail(&mut self, slot: Slot, error: ModelError) {
        self.emissions.push(Emission::Failed(slot, error));
    }
}

/// Why a model did not load. Operators read it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(pub String);

/// Why a model refused an input or gave up a sequence. Clients may read it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The input is at fault.
    #[error("{0}")]
    Invalid(String),
    /// The model is at fault.
    #[error("{0}")]
    Failed(String),
    /// Nobody is there who could say.
    #[error("{0}")]
    Unavailable(String),
}

/// Why a device can no longer be used. Operators read it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StepError(pub String);

/// The time now, in nanoseconds of CLOCK_MONOTONIC: the clock of every stamp.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since_boot = Duration::new(
        u64::try_from(now.tv_sec).expect("CLOCK_MONOTONIC is never negative"),
        u32::try_from(now.tv_nsec).expect("nanoseconds are below one billion"),
    );
    u64::try_from(since_boot.as_nanos()).expect("584 years of uptime fit")
}
