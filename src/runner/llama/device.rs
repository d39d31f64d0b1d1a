//! Runs sequences in a llama.cpp context with continuous batching. Each step decodes one row for every sequence that
//! has finished its prompt, and a chunk of the unfinished prompts.
//!
//! llama.cpp aborts the process on many invalid arguments, so everything is checked before a call: token ids, slots
//! and KV cells when a sequence is admitted, rows when a batch is filled.

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
    Model, ModelError, NextStep, Runner, Sequence, Slot, SlotCredit, Step, StepError, Token,
};
use crate::tokens::{Logprobs, TopLogprob};

/// Maximum number of prompt rows in one step, so that a long prompt delays running sequences only a little. It is
/// below 64: with fewer than 64 rows, a row's result does not depend on its chunk. With more rows, llama.cpp's
/// attention uses a kernel that rounds differently.
pub(super) const PREFILL_ROWS: usize = 63;

self_cell!(
    /// A llama.cpp context, together with the model that it borrows.
    pub(super) struct Context {
        owner: Arc<GgufModel>,
        #[not_covariant]
        dependent: LlamaContext,
    }
);

/// A device: one llama.cpp context that runs several sequences.
pub(super) struct LlamaRunner {
    context: Context,
    model: Arc<GgufModel>,
    batch: LlamaBatch<'static>,
    /// One entry per slot. The slot's index is also llama.cpp's sequence id.
    sequences: Vec<Option<ActiveSequence>>,
    admitted: u64,
    sampler: Sampler,
    /// The rows of each sequence in the current batch.
    parts: Vec<BatchPart>,
}

/// The rows of one sequence in a batch.
struct BatchPart {
    slot: Slot,
    rows: usize,
    /// Index of the first row in the batch.
    first_row: i32,
    /// True if the next token is sampled from the logits of the last row. False while the prompt has more rows.
    samples: bool,
}

impl LlamaRunner {
    /// Creates a runner. `context` must have room for `slots` sequences and for batches of [`batch_rows`] rows.
    pub(super) fn new(context: Context, slots: usize) -> Self {
        // llama.cpp may allow fewer rows than requested, and aborts the process on a larger batch.
        let allowed = context.with_dependent(|_, context| context.n_batch());
        let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
        Self {
            model: Arc::clone(context.borrow_owner()),
            context,
            batch: LlamaBatch::new(batch_rows(slots).min(allowed), 1),
            sequences: (0..slots).map(|_| None).collect(),
            admitted: 0,
            sampler: Sampler::default(),
            parts: Vec::with_capacity(slots),
        }
    }

    /// Checks that this device can run the sequence in the slot.
    fn check(&self, slot: Slot, sequence: &Sequence) -> Result<(), ModelError> {
        match self.sequences.get(slot.0) {
            Some(None) => {}
            Some(Some(_)) => {
                return Err(model_failed(format!(
                    "slot {} already has a sequence",
                    slot.0
                )));
            }
            None => return Err(model_failed(format!("there is no slot {}", slot.0))),
        }
        if sequence.prompt.is_empty() {
            return Err(invalid_input("The prompt is empty.".to_owned()));
        }
        let mut ids = sequence.prompt.iter().chain(&sequence.delivered);
        if let Some(id) = ids.find(|id| !self.model.has_token(**id)) {
            let reason = format!("Token id {id} is not in this model's vocabulary.");
            return Err(invalid_input(reason));
        }
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let context_length = self.model.facts().context_length;
        let cells = sequence.prompt.len().saturating_add(max_tokens);
        if cells > usize::try_from(context_length).unwrap_or(usize::MAX) {
            return Err(invalid_input(format!(
                "This model's context is {context_length} tokens; the prompt and `max_tokens` need {cells}."
            )));
        }
        if sequence.delivered.len() >= max_tokens && !sequence.scores_prompt {
            return Err(invalid_input(
                "The resumed request already has `max_tokens` tokens; nothing is left to generate."
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Decides how many rows each sequence gets in this step. A sequence that needs only one row always gets it. All
    /// others share the prefill rows, in the order of their admission.
    fn plan_rows(&mut self, step: &Step<'_>) {
        self.parts.clear();
        for (index, sequence) in self.sequences.iter().enumerate() {
            let (slot, Some(sequence)) = (Slot(index), sequence) else {
                continue;
            };
            let rows = sequence.rows(step.credit(slot));
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
        let admission = |part: &BatchPart| {
            sequences[part.slot.0]
                .as_ref()
                .map(|sequence| sequence.admission)
        };
        self.parts.sort_unstable_by_key(admission);
        let mut left = PREFILL_ROWS;
        for part in &mut self.parts {
            if part.rows > 1 {
                part.rows = part.rows.min(left);
                left -= part.rows;
            }
        }
        self.parts.retain(|part| part.rows > 0);
        // llama.cpp computes sequences together only if their ids ascend within the batch.
        self.parts.sort_unstable_by_key(|part| part.slot);
    }

    /// Adds the planned rows to the batch. Logits are requested for rows that a token is sampled from, and for all
    /// rows of a scored prompt.
    fn fill_batch(&mut self) -> Result<(), BatchError> {
        self.batch.clear();
        for part in &mut self.parts {
            let Some(sequence) = &self.sequences[part.slot.0] else {
                continue;
            };
            let seq_id = i32::try_from(part.slot.0)?;
            part.first_row = self.batch.n_tokens();
            part.samples = sequence.samples_after(part.rows);
            let (first, tokens) = sequence.next_rows(part.rows);
            for (offset, id) in tokens.iter().enumerate() {
                let is_sampled = part.samples && offset + 1 == part.rows;
                let has_output = is_sampled || sequence.is_scoring();
                let position = i32::try_from(first + offset)?;
                let token = LlamaToken(i32::try_from(*id)?);
                self.batch.add(token, position, &[seq_id], has_output)?;
            }
        }
        Ok(())
    }

    /// Emits the tokens of scored prompts, and samples and emits the next token of every sequence that has finished
    /// its prompt.
    fn emit_tokens(&mut self, step: &mut Step<'_>) {
        let (sequences, sampler, model) = (&mut self.sequences, &mut self.sampler, &self.model);
        let parts = &self.parts;
        self.context.with_dependent_mut(|_, context| {
            for part in parts {
                let Some(sequence) = &mut sequences[part.slot.0] else {
                    continue;
                };
                let mut emitted = Ok(());
                if sequence.is_scoring() {
                    emitted = emit_prompt(step, part, sequence, model, context);
                }
                sequence.advance(part.rows);
                if part.samples && emitted.is_ok() {
                    let logits = part.logits(context, part.rows - 1);
                    emitted = next_token(sampler, logits, sequence, model)
                        .map(|token| emit_next(step, part.slot, sequence, model, token));
                }
                if let Err(error) = emitted {
                    step.fail(part.slot, error);
                }
            }
        });
    }
}

impl BatchPart {
    /// Returns the logits of one of this sequence's rows. Logits must have been requested for the row.
    fn logits<'a>(&self, context: &'a LlamaContext<'_>, offset: usize) -> &'a [f32] {
        let offset =
            i32::try_from(offset).expect("the number of rows in a batch fits into 32 bits");
        context.get_logits_ith(self.first_row + offset)
    }
}

impl Runner for LlamaRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError> {
        self.check(slot, &sequence)?;
        self.admitted += 1;
        let active = ActiveSequence::new(&sequence, self.model.end_tokens(), self.admitted);
        self.sequences[slot.0] = Some(active);
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let Some(sequence) = self.sequences.get_mut(slot.0) else {
            return;
        };
        *sequence = None;
        let removed = i32::try_from(slot.0).map(|seq_id| {
            self.context
                .with_dependent_mut(|_, context| context.kv_cache_seq_rm(seq_id, None, None))
        });
        if !matches!(removed, Ok(Ok(()))) {
            tracing::error!(slot = slot.0, "could not free the KV cache of a slot");
        }
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        let mut sequences = self.sequences.iter().enumerate();
        let any = sequences.any(|(index, sequence)| {
            let sequence = sequence.as_ref();
            sequence.is_some_and(|sequence| sequence.rows(credit.credit(Slot(index))) > 0)
        });
        if any { NextStep::Now } else { NextStep::Idle }
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.plan_rows(step);
        if self.parts.is_empty() {
            return Ok(());
        }
        self.fill_batch()
            .map_err(|error| StepError(format!("could not fill a batch: {error}")))?;
        let (context, batch) = (&mut self.context, &mut self.batch);
        match context.with_dependent_mut(|_, context| context.decode(batch)) {
            Ok(()) => self.emit_tokens(step),
            // This should not happen, because each sequence has enough KV cells for its whole context. llama.cpp has
            // left the context unchanged, so only these sequences fail, and the device continues.
            Err(DecodeError::NoKvCacheSlot) => {
                for part in &self.parts {
                    step.fail(part.slot, model_failed("The KV cache is full.".to_owned()));
                }
            }
            Err(error @ (DecodeError::NTokensZero | DecodeError::Unknown(_))) => {
                return Err(StepError(format!("llama.cpp could not decode: {error}")));
            }
        }
        Ok(())
    }
}

/// Returns the number of rows in a batch: one per slot, plus the prefill rows.
pub(super) fn batch_rows(slots: usize) -> usize {
    slots + PREFILL_ROWS
}

/// Emits the tokens of a scored prompt. The logits of each row give the log probabilities of the next token.
fn emit_prompt(
    step: &mut Step<'_>,
    part: &BatchPart,
    sequence: &ActiveSequence,
    model: &GgufModel,
    context: &LlamaContext<'_>,
) -> Result<(), ModelError> {
    if sequence.computed() == 0
        && let Some(id) = sequence.prompt_token(0)
    {
        let logprobs = Logprobs {
            token_bytes: model.full_bytes(id),
            ..Logprobs::default()
        };
        step.emit_prompt(part.slot, token_with_logprobs(model, id, Some(logprobs))?);
    }
    for offset in 0..part.rows {
        let Some(id) = sequence.prompt_token(sequence.computed() + offset + 1) else {
            continue;
        };
        let logprobs = logprobs(model, part.logits(context, offset), id, sequence)?;
        step.emit_prompt(part.slot, token_with_logprobs(model, id, logprobs)?);
    }
    Ok(())
}

/// Samples the next token of a sequence.
fn next_token(
    sampler: &mut Sampler,
    logits: &[f32],
    sequence: &ActiveSequence,
    model: &GgufModel,
) -> Result<Token, ModelError> {
    let id = sampler.sample(
        logits,
        &sequence.sampling,
        &sequence.history,
        sequence.logit_adjustments(),
        sequence.draw_key(),
    );
    let id = id.map_err(|error| model_failed(error.to_string()))?;
    let logprobs = logprobs(model, logits, id, sequence)?;
    token_with_logprobs(model, id, logprobs)
}

/// Emits the next token of a sequence.
fn emit_next(
    step: &mut Step<'_>,
    slot: Slot,
    sequence: &mut ActiveSequence,
    model: &GgufModel,
    token: Token,
) {
    let id = token.id;
    let is_end_token = model.end_tokens().contains(&id);
    sequence.push(id);
    if sequence.ends_with(id, is_end_token) {
        step.end(slot, token);
    } else {
        step.emit(slot, token);
    }
}

/// Computes the log probabilities of this token, if the sequence asks for them.
fn logprobs(
    model: &GgufModel,
    logits: &[f32],
    id: TokenId,
    sequence: &ActiveSequence,
) -> Result<Option<Logprobs>, ModelError> {
    let Some(top) = sequence.logprobs else {
        return Ok(None);
    };
    let position = logprobs::position_logprobs(logits, id, top)
        .map_err(|error| model_failed(error.to_string()))?;
    let top = position.top.into_iter().map(|(id, logprob)| TopLogprob {
        id,
        token_bytes: model.full_bytes(id),
        logprob,
    });
    Ok(Some(Logprobs {
        logprob: Some(position.logprob),
        token_bytes: model.full_bytes(id),
        top: top.collect(),
    }))
}

fn token_with_logprobs(
    model: &GgufModel,
    id: TokenId,
    logprobs: Option<Logprobs>,
) -> Result<Token, ModelError> {
    let unknown = || model_failed(format!("Token id {id} is not in this model's vocabulary."));
    Ok(Token {
        id,
        bytes: model.visible_bytes(id).ok_or_else(unknown)?,
        due_ns: 0,
        emitted_ns: 0,
        logprobs: logprobs.map(Box::new),
    })
}

fn invalid_input(reason: String) -> ModelError {
    ModelError::Invalid(reason)
}

fn model_failed(reason: String) -> ModelError {
    ModelError::Failed(reason)
}

/// Reason why a batch could not be filled. It should never occur, because sequences are checked when they are
/// admitted.
#[derive(Debug, thiserror::Error)]
enum BatchError {
    #[error("a row index or a slot does not fit into 32 bits: {0}")]
    Number(#[from] std::num::TryFromIntError),
    #[error("{0}")]
    Full(#[from] BatchAddError),
}

#[cfg(test)]
mod tests;
