//! A llama.cpp context as a runner: continuous batching. Each step decodes one row for every sequence
//! that is past its prompt, and a chunk of the prompts that are not.
//!
//! llama.cpp checks little and aborts the process on much, so every bound is checked before a call:
//! ids, slots and cells when a sequence is admitted, rows when a batch is filled. It must not know
//! the text of a token.

use std::sync::Arc;

use llama_cpp_2::DecodeError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::{BatchAddError, LlamaBatch};
use llama_cpp_2::token::LlamaToken;
use self_cell::self_cell;

use super::logprobs;
use super::model::GgufModel;
use super::sampling::Sampler;
use super::sequence::ActiveSequence;
use crate::request::TokenId;
use crate::runner::{
    Model, ModelError, Next, Runner, Sequence, Slot, SlotCredit, Step, StepError, Token,
};
use crate::tokens::{Logprobs, TopLogprob};

/// The most rows of prompts in one step, so that a long prompt delays the running sequences little.
/// One less than the 64 at which llama.cpp's attention changes to a kernel that rounds otherwise: a
/// row's result does not depend on the chunk it came in.
pub(super) const PREFILL_ROWS: usize = 63;

self_cell!(
    /// A context together with the model that it borrows.
    pub(super) struct Context {
        owner: Arc<GgufModel>,
        #[not_covariant]
        dependent: LlamaContext,
    }
);

/// The device.
pub(super) struct LlamaRunner {
    context: Context,
    model: Arc<GgufModel>,
    batch: LlamaBatch<'static>,
    /// By slot; a slot is llama.cpp's sequence id.
    sequences: Vec<Option<ActiveSequence>>,
    admitted: u64,
    sampler: Sampler,
    /// The sequences of the current batch, and how far each gets by it.
    parts: Vec<BatchPart>,
}

/// What a batch holds of one sequence.
struct BatchPart {
    slot: Slot,
    rows: usize,
    /// Its first row's place in the batch.
    first_row: i32,
    /// Whether the last row's logits give the next token; not while the prompt goes on.
    samples: bool,
}

impl LlamaRunner {
    /// A runner on a context that was made for as many sequences as there are slots, and for as many
    /// rows as [`rows`] says.
    pub(super) fn new(context: Context, slots: usize) -> Self {
        // llama.cpp may allow fewer, and a batch that is larger than that aborts the process.
        let allowed = context.with_dependent(|_, context| context.n_batch());
        let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
        Self {
            model: Arc::clone(context.borrow_owner()),
            context,
            batch: LlamaBatch::new(rows(slots).min(allowed), 1),
            sequences: (0..slots).map(|_| None).collect(),
            admitted: 0,
            sampler: Sampler::default(),
            parts: Vec::with_capacity(slots),
        }
    }

    /// What keeps this device from running the sequence, if anything does.
    fn check(&self, slot: Slot, sequence: &Sequence) -> Result<(), ModelError> {
        match self.sequences.get(slot.0) {
            Some(None) => {}
            Some(Some(_)) => return Err(failed(format!("slot {} is not free", slot.0))),
            None => return Err(failed(format!("there is no slot {}", slot.0))),
        }
        if sequence.prompt.is_empty() {
            return Err(invalid("The prompt is empty.".to_owned()));
        }
        let mut ids = sequence.prompt.iter().chain(&sequence.delivered);
        if let Some(id) = ids.find(|id| !self.model.has(**id)) {
            let reason = format!("Token id {id} is not in this model's vocabulary.");
            return Err(invalid(reason));
        }
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let context_length = self.model.facts().context_length;
        let cells = sequence.prompt.len().saturating_add(max_tokens);
        if cells > usize::try_from(context_length).unwrap_or(usize::MAX) {
            return Err(invalid(format!(
                "This model's context is {context_length} tokens; the prompt and max_tokens need {cells}."
            )));
        }
        if sequence.delivered.len() >= max_tokens && !sequence.scores_prompt {
            return Err(invalid("All of max_tokens are delivered.".to_owned()));
        }
        Ok(())
    }

    /// Decides how many rows each sequence has in this step. Whoever needs one row only has it; the
    /// others share the rows for prompts, the longest waiting first.
    fn plan(&mut self, step: &Step<'_>) {
        self.parts.clear();
        for (index, running) in self.sequences.iter().enumerate() {
            let (slot, Some(running)) = (Slot(index), running) else {
                continue;
            };
            let rows = running.rows(step.credit(slot));
            if rows > 0 {
                self.parts.push(BatchPart {
                    slot,
                    rows,
                    first_row: 0,
                    samples: false,
                });
            }
        }
        let sequences = &self.sequences;
        let number = |part: &BatchPart| {
            sequences[part.slot.0]
                .as_ref()
                .map(|running| running.number)
        };
        self.parts.sort_unstable_by_key(number);
        let mut left = PREFILL_ROWS;
        for part in &mut self.parts {
            if part.rows > 1 {
                part.rows = part.rows.min(left);
                left -= part.rows;
            }
        }
        self.parts.retain(|part| part.rows > 0);
        // llama.cpp computes consecutive sequences of a batch together, in this order only.
        self.parts.sort_unstable_by_key(|part| part.slot);
    }

    /// Puts the planned rows into the batch. Only the row that the next token follows has an output, or
    /// every row of a prompt whose tokens are asked for.
    fn fill(&mut self) -> Result<(), BatchError> {
        self.batch.clear();
        for part in &mut self.parts {
            let Some(running) = &self.sequences[part.slot.0] else {
                continue;
            };
            let seq_id = i32::try_from(part.slot.0)?;
            part.first_row = self.batch.n_tokens();
            part.samples = running.samples_after(part.rows);
            let (first, tokens) = running.next_rows(part.rows);
            for (offset, id) in tokens.iter().enumerate() {
                let is_sampled = part.samples && offset + 1 == part.rows;
                let has_output = is_sampled || running.is_scoring();
                let position = i32::try_from(first + offset)?;
                let token = LlamaToken(i32::try_from(*id)?);
                self.batch.add(token, position, &[seq_id], has_output)?;
            }
        }
        Ok(())
    }

    /// Emits what the decoded rows tell: the tokens of prompts that are asked for, and the next token of
    /// every sequence whose prompt is through.
    fn emit(&mut self, step: &mut Step<'_>) {
        let (sequences, sampler, model) = (&mut self.sequences, &mut self.sampler, &self.model);
        let parts = &self.parts;
        self.context.with_dependent_mut(|_, context| {
            for part in parts {
                let Some(running) = &mut sequences[part.slot.0] else {
                    continue;
                };
                let mut emitted = Ok(());
                if running.is_scoring() {
                    emitted = emit_prompt(step, part, running, model, context);
                }
                running.took(part.rows);
                if part.samples && emitted.is_ok() {
                    let logits = part.logits(context, part.rows - 1);
                    emitted = emit_next(step, part.slot, running, model, (sampler, logits));
                }
                if let Err(error) = emitted {
                    step.fail(part.slot, error);
                }
            }
        });
    }
}

impl BatchPart {
    /// The logits of one of its rows that have an output.
    fn logits<'a>(&self, context: &'a LlamaContext<'_>, offset: usize) -> &'a [f32] {
        let offset = i32::try_from(offset).expect("a batch's rows are few");
        context.get_logits_ith(self.first_row + offset)
    }
}

impl Runner for LlamaRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError> {
        self.check(slot, &sequence)?;
        self.admitted += 1;
        let running = ActiveSequence::new(&sequence, self.model.ends(), self.admitted);
        self.sequences[slot.0] = Some(running);
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let Some(running) = self.sequences.get_mut(slot.0) else {
            return;
        };
        *running = None;
        let removed = i32::try_from(slot.0).map(|seq_id| {
            self.context
                .with_dependent_mut(|_, context| context.kv_cache_seq_rm(seq_id, None, None))
        });
        if !matches!(removed, Ok(Ok(()))) {
            tracing::error!(slot = slot.0, "a sequence's cells could not be freed");
        }
    }

    fn next(&mut self, credit: &dyn SlotCredit) -> Next {
        let mut sequences = self.sequences.iter().enumerate();
        let any = sequences.any(|(index, running)| {
            let running = running.as_ref();
            running.is_some_and(|running| running.rows(credit.credit(Slot(index))) > 0)
        });
        if any { Next::Now } else { Next::Idle }
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.plan(step);
        if self.parts.is_empty() {
            return Ok(());
        }
        self.fill()
            .map_err(|error| StepError(format!("a batch could not be filled: {error}")))?;
        let (context, batch) = (&mut self.context, &mut self.batch);
        match context.with_dependent_mut(|_, context| context.decode(batch)) {
            Ok(()) => self.emit(step),
            // The context is as it was before. Every sequence has its own cells, as many as it may
            // need, so this does not happen; were it to, it is not the device's end.
            Err(DecodeError::NoKvCacheSlot) => {
                for part in &self.parts {
                    step.fail(part.slot, failed("the device has no cell left".to_owned()));
                }
            }
            Err(error @ (DecodeError::NTokensZero | DecodeError::Unknown(_))) => {
                return Err(StepError(format!("the device could not decode: {error}")));
            }
        }
        Ok(())
    }
}

/// How many rows a batch has: one for each sequence, and the prompts' share.
pub(super) fn rows(slots: usize) -> usize {
    slots + PREFILL_ROWS
}

/// Emits the tokens of a prompt that these rows tell of: each the one behind it.
fn emit_prompt(
    step: &mut Step<'_>,
    part: &BatchPart,
    running: &ActiveSequence,
    model: &GgufModel,
    context: &LlamaContext<'_>,
) -> Result<(), ModelError> {
    if running.taken() == 0
        && let Some(id) = running.prompt_token(0)
    {
        let logprobs = Logprobs {
            token_bytes: model.vocabulary_bytes(id),
            ..Logprobs::default()
        };
        step.prompt(part.slot, token(model, id, Some(logprobs))?);
    }
    for offset in 0..part.rows {
        let Some(id) = running.prompt_token(running.taken() + offset + 1) else {
            continue;
        };
        let logprobs = logprobs(model, part.logits(context, offset), id, running)?;
        step.prompt(part.slot, token(model, id, logprobs)?);
    }
    Ok(())
}

/// Samples the next token of a sequence from its logits, and emits it.
fn emit_next(
    step: &mut Step<'_>,
    slot: Slot,
    running: &mut ActiveSequence,
    model: &GgufModel,
    (sampler, logits): (&mut Sampler, &[f32]),
) -> Result<(), ModelError> {
    let (sampling, history) = (&running.sampling, &running.history);
    let id = sampler.sample(logits, sampling, history, running.moved(), running.draw());
    let id = id.map_err(|error| failed(error.to_string()))?;
    let logprobs = logprobs(model, logits, id, running)?;
    let token = token(model, id, logprobs)?;
    let is_end = model.ends().contains(&id);
    running.push(id);
    if running.ends_with(id, is_end) {
        step.end(slot, token);
    } else {
        step.emit(slot, token);
    }
    Ok(())
}

/// What the model thought of this token, where its sequence asks.
fn logprobs(
    model: &GgufModel,
    logits: &[f32],
    id: TokenId,
    running: &ActiveSequence,
) -> Result<Option<Logprobs>, ModelError> {
    let Some(top) = running.logprobs else {
        return Ok(None);
    };
    let position = logprobs::of(logits, id, top).map_err(|error| failed(error.to_string()))?;
    let top = position.top.into_iter().map(|(id, logprob)| TopLogprob {
        id,
        token_bytes: model.vocabulary_bytes(id),
        logprob,
    });
    Ok(Some(Logprobs {
        logprob: Some(position.logprob),
        token_bytes: model.vocabulary_bytes(id),
        top: top.collect(),
    }))
}

fn token(model: &GgufModel, id: TokenId, logprobs: Option<Logprobs>) -> Result<Token, ModelError> {
    let bytes = model.token_bytes(id);
    Ok(Token {
        id,
        bytes: bytes.ok_or_else(|| failed(format!("token {id} is not in the vocabulary")))?,
        due_ns: 0,
        emitted_ns: 0,
        logprobs: logprobs.map(Box::new),
    })
}

fn invalid(reason: String) -> ModelError {
    ModelError::Invalid(reason)
}

fn failed(reason: String) -> ModelError {
    ModelError::Failed(reason)
}

/// Why a batch could not be filled; the checks before rule it out.
#[derive(Debug, thiserror::Error)]
enum BatchError {
    #[error("a number is too large: {0}")]
    Number(#[from] std::num::TryFromIntError),
    #[error("{0}")]
    Full(#[from] BatchAddError),
}

#[cfg(test)]
mod tests;
