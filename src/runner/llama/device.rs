//! Runs sequences in a llama.cpp context with continuous batching. A step sends the tokens that sequences had no credit
//! for, samples from reused logits, or makes one call of llama.cpp. A call computes either one row for every sequence
//! that has finished its prompt, together with short parts of other prompts, or a large part of one prompt. Calls of
//! the two kinds take turns, so that a long prompt delays running sequences only a little. A row is one token of one
//! sequence in such a call.
//!
//! llama.cpp aborts the process on many invalid arguments, so everything is checked before a call: token ids, slots
//! and KV cells when a sequence is admitted, rows when a batch is filled.

use std::sync::Arc;
use std::time::Duration;

use llama_cpp_2::DecodeError;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::session::SeqState;
use llama_cpp_2::llama_batch::LlamaBatch;
use self_cell::self_cell;

use super::first_logits::LogitsBuffers;
use super::model::GgufModel;
use super::prefill::{Chunk, PrefillPlan, TILED_ROWS};
use super::prefix_cache::PrefixStore;
use super::sampling::Sampler;
use super::sequence::ActiveSequence;
use super::step_budget::StepBudget;
use crate::request::TokenId;
use crate::runner::{
    Model, ModelError, NextStep, PrefixCacheStats, Resumption, Runner, Sequence, SequenceStart,
    Slot, SlotCredit, Step, StepError, monotonic_ns,
};
use batch::BatchPart;
use slot_state::{SlotState, SlotStates};

mod batch;
mod emission;
mod prefix_reuse;
mod slot_state;

/// Maximum number of prompt rows in a call of the tiled kernel. It is an estimate of the number from which a row hardly
/// becomes cheaper.
const MAX_TILED_ROWS: usize = 512;

/// Minimum budget of prompt rows in a call of the tiled kernel, except for the first call. Between two such calls, the
/// running sequences compute one token each, which delays the prompt. With eight sequences on a CPU, this takes about
/// as long as ten prompt rows, so 128 rows limit the delay to less than a tenth.
const MIN_TILED_ROWS: usize = 128;

/// Number of prompt rows in the first call of the tiled kernel, before the cost of a row is known.
const FIRST_ROWS: usize = 64;

/// Maximum number of prompt rows for the row kernel in one call.
const MAX_ROWS: usize = TILED_ROWS - 1;

/// Minimum budget of prompt rows for the row kernel in one call.
const MIN_ROWS: usize = 8;

/// Divisor of the budget for the row kernel: a quarter is reserved for sequences with at least [`TILED_ROWS`] rows
/// left, so that short prompts cannot stop them.
const RESERVED_SHARE: usize = 4;

self_cell!(
    /// A llama.cpp context, together with the model that it borrows.
    pub(super) struct Context {
        owner: Arc<GgufModel>,
        #[not_covariant]
        dependent: LlamaContext,
    }
);

/// Settings of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceOptions {
    pub(super) slots: usize,
    /// True if a sequence may start from tokens that an earlier sequence has computed.
    pub(super) reuses_prefixes: bool,
    /// Memory in bytes for the computed tokens of sequences that had to leave their slot.
    pub(super) prefix_cache_bytes: usize,
    /// Target for the longest duration of a call with prompt rows.
    pub(super) max_step: Duration,
}

/// A device: one llama.cpp context that runs several sequences.
pub(super) struct LlamaRunner {
    context: Context,
    model: Arc<GgufModel>,
    batch: LlamaBatch<'static>,
    /// One entry per slot. The slot's index is also llama.cpp's sequence id.
    slots: SlotStates,
    store: PrefixStore<SeqState>,
    logits_buffers: LogitsBuffers,
    reuses_prefixes: bool,
    admitted: u64,
    sampler: Sampler,
    /// The rows of each sequence in the current call.
    parts: Vec<BatchPart>,
    tiled_budget: StepBudget,
    row_budget: StepBudget,
    /// True if the current call computes parts of prompts, and not only one row for each sequence.
    has_prompt_rows: bool,
    /// True if the last call was one of the tiled kernel.
    last_was_tiled: bool,
}

/// The kind of a call of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallKind {
    /// A large part of one prompt.
    Tiled,
    /// Single rows, and short parts of prompts.
    Rows,
}

impl LlamaRunner {
    /// Creates a runner. `context` must have room for the slots and for batches of [`batch_rows`] rows.
    pub(super) fn new(context: Context, options: DeviceOptions) -> Self {
        let DeviceOptions {
            slots,
            reuses_prefixes,
            prefix_cache_bytes,
            max_step,
        } = options;
        // llama.cpp may allow fewer rows than requested, and aborts the process on a larger batch.
        let allowed = context.with_dependent(|_, context| context.n_batch());
        let rows = batch_rows(slots).min(usize::try_from(allowed).unwrap_or(usize::MAX));
        let max_tiled = MAX_TILED_ROWS.min(rows);
        let min_tiled = MIN_TILED_ROWS.min(max_tiled);
        Self {
            model: Arc::clone(context.borrow_owner()),
            context,
            batch: LlamaBatch::new(rows, 1),
            slots: SlotStates::new(slots),
            store: PrefixStore::new(prefix_cache_bytes),
            logits_buffers: LogitsBuffers::new(slots),
            reuses_prefixes,
            admitted: 0,
            sampler: Sampler::default(),
            parts: Vec::with_capacity(slots),
            tiled_budget: StepBudget::new(max_step, FIRST_ROWS, min_tiled..=max_tiled),
            row_budget: StepBudget::new(max_step, MAX_ROWS, MIN_ROWS..=MAX_ROWS),
            has_prompt_rows: false,
            last_was_tiled: false,
        }
    }

    /// Checks that the slot exists and runs no sequence.
    fn check_slot(&self, slot: Slot) -> Result<(), ModelError> {
        match self.slots.get(slot) {
            Some(SlotState::Empty | SlotState::Kept(_)) => Ok(()),
            Some(SlotState::Active(_)) => Err(model_failed(format!(
                "slot {} already has a sequence",
                slot.0
            ))),
            None => Err(model_failed(format!("there is no slot {}", slot.0))),
        }
    }

    /// Checks that this device can run the sequence.
    fn check_sequence(&self, sequence: &Sequence) -> Result<(), ModelError> {
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

    fn prefill_plan(&self, prompt: &[TokenId]) -> PrefillPlan {
        match self.model.facts().resumption {
            Resumption::Exact => PrefillPlan::exact(prompt, self.model.chat_markers()),
            Resumption::Contiguous | Resumption::No => PrefillPlan::Contiguous,
        }
    }

    /// Decides which rows the next call computes. Calls of the two kinds take turns while both have work.
    fn plan_call(&mut self, step: &Step<'_>) -> CallKind {
        let budget = self.tiled_budget.rows();
        let mut tiled = None;
        for (slot, sequence) in self.slots.active() {
            match sequence.next_chunk(step.credit(slot), budget) {
                None => {}
                Some(Chunk::Rows(rows)) => self.parts.push(BatchPart::new(slot, rows)),
                Some(Chunk::Tiled(rows)) => {
                    let first = tiled.get_or_insert((sequence.admission, slot, rows));
                    if sequence.admission < first.0 {
                        *first = (sequence.admission, slot, rows);
                    }
                }
            }
        }
        if let Some((_, slot, rows)) = tiled
            && (self.parts.is_empty() || !self.last_was_tiled)
        {
            self.parts.clear();
            self.parts.push(BatchPart::new(slot, rows));
            self.has_prompt_rows = true;
            return CallKind::Tiled;
        }
        self.share_rows();
        CallKind::Rows
    }

    /// Limits the prompt rows in a call of the row kernel. A sequence that needs only one row always gets it. The other
    /// sequences share the budget: first those with fewer than [`TILED_ROWS`] rows left, in the order of their
    /// admission, then longer ones. A part of the budget is reserved for the longer ones.
    fn share_rows(&mut self) {
        let slots = &self.slots;
        let sequence = |part: &BatchPart| slots.sequence(part.slot);
        let is_long = |part: &BatchPart| sequence(part).is_some_and(|it| !it.is_short());
        self.parts.sort_unstable_by_key(|part| {
            let admission = sequence(part).map(|it| it.admission);
            (part.rows > 1, is_long(part), admission)
        });
        let first = self.parts.partition_point(|part| part.rows == 1);
        let prompts = &mut self.parts[first..];
        self.has_prompt_rows = !prompts.is_empty();
        let mut left = self.row_budget.rows();
        let reserved = match prompts.last().is_some_and(&is_long) {
            true => left / RESERVED_SHARE,
            false => 0,
        };
        for part in prompts {
            let available = match is_long(part) {
                true => left,
                false => left.saturating_sub(reserved),
            };
            part.rows = part.rows.min(available);
            left -= part.rows;
        }
        self.parts.retain(|part| part.rows > 0);
        // llama.cpp computes sequences together only if their ids ascend within the batch.
        self.parts.sort_unstable_by_key(|part| part.slot);
    }

    /// Emits the tokens that sequences computed earlier but had no credit for. Returns true if there were any.
    fn send_unsent(&mut self, step: &mut Step<'_>) -> bool {
        let mut any = false;
        for (slot, sequence) in self.slots.active_mut() {
            if sequence.has_unsent(step.credit(slot)) {
                sequence.send(slot, step);
                any = true;
            }
        }
        any
    }

    /// Adjusts the budget of this kind of call, if the call had prompt rows.
    fn record_duration(&mut self, kind: CallKind, started_ns: u64) {
        if !self.has_prompt_rows {
            return;
        }
        let rows = self.parts.iter().map(|part| part.rows).sum();
        let elapsed = Duration::from_nanos(monotonic_ns().saturating_sub(started_ns));
        let budget = match kind {
            CallKind::Tiled => &mut self.tiled_budget,
            CallKind::Rows => &mut self.row_budget,
        };
        budget.record(rows, elapsed);
    }
}

impl Runner for LlamaRunner {
    fn choose_slot(&self, sequence: &Sequence, free: &[Slot]) -> Slot {
        // `admit` will reject an invalid sequence in any slot.
        match self.check_sequence(sequence) {
            Ok(()) => self.choose_slot_by_prefix(sequence, free),
            Err(_) => self.slots.least_recently_used(free, None),
        }
    }

    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.check_slot(slot)?;
        self.check_sequence(&sequence)?;
        self.admitted += 1;
        let plan = self.prefill_plan(&sequence.prompt);
        let end_tokens = self.model.end_tokens();
        let active = ActiveSequence::new(&sequence, end_tokens, self.admitted, plan);
        // A resumed sequence may also reuse tokens of its completion. They are not prompt tokens, so they do not count.
        let cached_tokens = self.start(slot, active).min(sequence.prompt.len());
        Ok(SequenceStart {
            cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
        })
    }

    fn release(&mut self, slot: Slot) {
        if let Some(sequence) = self.slots.take_active(slot) {
            self.keep(slot, *sequence);
        }
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        let budget = self.tiled_budget.rows();
        let any = self.slots.active().any(|(slot, sequence)| {
            let credit = credit.credit(slot);
            sequence.has_unsent(credit)
                || sequence.reused_logits(credit).is_some()
                || sequence.next_chunk(credit, budget).is_some()
                || sequence
                    .leader
                    .is_some_and(|leader| self.slots.is_done(leader))
        });
        if any { NextStep::Now } else { NextStep::Idle }
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.parts.clear();
        self.batch.clear();
        // The credit does not go down within a step, so a call must not emit more tokens of the same sequences.
        if self.send_unsent(step) {
            return Ok(());
        }
        self.copy_from_leaders();
        if self.sample_reused(step) {
            return Ok(());
        }
        let kind = self.plan_call(step);
        if self.parts.is_empty() {
            return Ok(());
        }
        self.last_was_tiled = kind == CallKind::Tiled;
        self.fill_batch()
            .map_err(|error| StepError(format!("could not fill a batch: {error}")))?;
        let started_ns = monotonic_ns();
        let (context, batch) = (&mut self.context, &mut self.batch);
        match context.with_dependent_mut(|_, context| compute(context, batch)) {
            Ok(()) => {
                self.record_duration(kind, started_ns);
                self.emit_tokens(step);
            }
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

    fn prefix_cache(&self) -> PrefixCacheStats {
        PrefixCacheStats {
            bytes: u64::try_from(self.store.bytes()).unwrap_or(u64::MAX),
            evictions: self.store.evictions(),
        }
    }
}

/// Returns the maximum number of rows in a batch: one row per slot together with short parts of prompts, or a large
/// part of one prompt.
pub(super) fn batch_rows(slots: usize) -> usize {
    (slots + MAX_ROWS).max(MAX_TILED_ROWS)
}

/// Computes a batch, and waits for the result. `decode` alone only queues the work of a GPU, so the budgets would be
/// based on the time for queueing it.
fn compute(context: &mut LlamaContext<'_>, batch: &mut LlamaBatch<'_>) -> Result<(), DecodeError> {
    context.decode(batch)?;
    context.synchronize();
    Ok(())
}

fn invalid_input(reason: String) -> ModelError {
    ModelError::Invalid(reason)
}

fn model_failed(reason: String) -> ModelError {
    ModelError::Failed(reason)
}

#[cfg(test)]
mod tests;
