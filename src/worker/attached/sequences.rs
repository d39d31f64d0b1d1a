//! The sequences on a remote worker: the progress and the credit of each, and checks of the worker's messages.
//!
//! This module sends nothing. It collects messages to the worker and to the scheduler in [`Effects`].

use std::collections::HashMap;
use std::sync::Arc;

use crate::proto::worker as proto;
use crate::request::{FinishReason, TokenId};
use crate::runner::{Slot, SlotCredit, monotonic_ns};
use crate::worker::slots::{FreedSlot, Slots};
use crate::worker::token_channel::Failure;
use crate::worker::wire::{self, SequenceId, Violation};
use crate::worker::{Assignment, AssignmentId};

/// Minimum number of tokens in a grant of credit to a sequence that still has credit. Larger grants mean fewer
/// messages.
const MIN_GRANT: usize = 128;

/// All sequences of one generation of a worker.
pub(super) struct Sequences {
    slots: Slots,
    /// The sequence in each slot.
    by_slot: Vec<Option<RemoteSequence>>,
    by_number: HashMap<u64, Slot>,
    /// Number of tokens in the vocabulary. Valid token ids are lower.
    vocabulary_size: u32,
    /// Id of the latest sequence. Sequence numbers keep increasing over all generations.
    last: SequenceId,
    effects: Effects,
}

/// A sequence that was submitted to the worker.
struct RemoteSequence {
    number: u64,
    submitted_ns: u64,
    is_accepted: bool,
    /// Length of the prompt in tokens.
    prompt_tokens: u32,
    /// True if each token must have log probabilities.
    wants_logprobs: bool,
    /// Index of the next completion token.
    next_index: u32,
    /// Index of the next prompt token.
    next_prompt_index: u32,
    /// The prompt, while requested prompt tokens are still missing.
    scoring: Option<Arc<[TokenId]>>,
    max_tokens: u32,
    min_tokens: u32,
    /// Number of tokens that the worker may still send.
    credit: usize,
    /// Number of remaining tokens for which the worker has no credit yet.
    not_granted: usize,
}

/// Messages and metrics that result from a change.
#[derive(Default)]
pub(super) struct Effects {
    /// For the worker: more credit for sequences.
    pub(super) grants: Vec<proto::Grant>,
    /// For the worker: numbers of cancelled sequences.
    pub(super) cancelled: Vec<u64>,
    /// For the scheduler: the assignments whose slots became free.
    pub(super) released: Vec<AssignmentId>,
    /// For the scheduler: number of crash suspects that are cleared.
    pub(super) cleared: usize,
    /// For the metrics: number of completion tokens.
    pub(super) tokens: u64,
    /// For the metrics: number of reused prompt tokens of each accepted sequence.
    pub(super) cached_tokens: Vec<u32>,
}

impl Sequences {
    /// Creates the empty slots of a worker. `last` has the number of the latest sequence of the previous generation,
    /// and the generation that starts now.
    pub(super) fn new(slots: usize, slow_reader_ns: u64, last: SequenceId) -> Self {
        Self {
            slots: Slots::new(slots, slow_reader_ns),
            by_slot: (0..slots).map(|_| None).collect(),
            by_number: HashMap::new(),
            vocabulary_size: u32::MAX,
            last,
            effects: Effects::default(),
        }
    }

    /// Sets the vocabulary size, which token ids must be below.
    pub(super) fn with_vocabulary(self, vocabulary_size: u32) -> Self {
        Self {
            vocabulary_size,
            ..self
        }
    }

    /// The number of the latest sequence.
    pub(super) fn last_number(&self) -> u64 {
        self.last.number
    }

    /// Number of sequences, as a float for the gauge.
    pub(super) fn count(&self) -> f64 {
        self.slots.count()
    }

    /// Submission time of the oldest sequence that the worker has neither accepted nor rejected, in nanoseconds of
    /// CLOCK_MONOTONIC. `None` if there is none.
    pub(super) fn oldest_unaccepted_ns(&self) -> Option<u64> {
        let waiting = self.by_slot.iter().flatten().filter(|it| !it.is_accepted);
        waiting.map(|it| it.submitted_ns).min()
    }

    /// Returns and resets the effects since the last call.
    pub(super) fn take_effects(&mut self) -> Effects {
        self.effects.cleared += self.slots.take_cleared_suspects();
        std::mem::take(&mut self.effects)
    }

    /// Adds a sequence, and returns the message that submits it to the worker. Returns `None` if the sequence ends
    /// without running.
    pub(super) fn submit(&mut self, assignment: Assignment) -> Option<proto::Submit> {
        let (id, is_suspect) = (assignment.id, assignment.is_suspect);
        let max_tokens = assignment.sequence.max_tokens;
        let Some(runnable) = assignment.into_runnable() else {
            self.record_not_run(id, is_suspect);
            return None;
        };
        let Some(&slot) = self.slots.free().last() else {
            let request = &runnable.assignment.sequence.request_id.0;
            tracing::error!(id = %request, "the scheduler assigned a sequence to a worker without a free slot");
            self.record_not_run(id, is_suspect);
            return None;
        };
        self.last.number += 1;
        let assignment = &runnable.assignment;
        let (number, sequence) = (self.last.number, &assignment.sequence);
        tracing::debug!(id = %sequence.request_id.0, number, "a sequence is submitted to a remote worker");
        let delivered = sequence.delivered.len();
        let scoring = sequence.scores_prompt.then(|| Arc::clone(&sequence.prompt));
        let prompt_tokens = scoring.as_ref().map_or(0, |prompt| prompt.len());
        let remaining = usize::try_from(max_tokens).unwrap_or(usize::MAX);
        let remaining = remaining
            .saturating_sub(delivered)
            .saturating_add(prompt_tokens);
        let credit = assignment.token_channel.credit().clamp(1, remaining.max(1));
        let initial_credit = u32::try_from(credit).unwrap_or(u32::MAX);
        let submit = wire::submit_message(sequence, self.last, initial_credit);
        self.by_slot[slot.0] = Some(RemoteSequence {
            number,
            submitted_ns: monotonic_ns(),
            is_accepted: false,
            prompt_tokens: u32::try_from(sequence.prompt.len()).unwrap_or(u32::MAX),
            wants_logprobs: sequence.options.logprobs.is_some(),
            next_index: u32::try_from(delivered).unwrap_or(u32::MAX),
            next_prompt_index: 0,
            scoring,
            max_tokens,
            min_tokens: sequence.options.stop_tokens.min_tokens,
            credit,
            not_granted: remaining.saturating_sub(credit),
        });
        self.by_number.insert(number, slot);
        self.slots.occupy(slot, runnable);
        Some(submit)
    }

    /// Records that an assigned sequence has ended before it was submitted.
    fn record_not_run(&mut self, id: AssignmentId, is_suspect: bool) {
        self.effects.cleared += usize::from(is_suspect);
        self.effects.released.push(id);
    }

    /// Handles the message `accepted`. An unknown number is ignored, because the sequence may have been cancelled.
    ///
    /// # Errors
    /// Returns an error if the worker reports more cached tokens than the prompt has.
    pub(super) fn handle_accepted(&mut self, accepted: proto::Accepted) -> Result<(), Violation> {
        let Some(&slot) = self.by_number.get(&accepted.sequence) else {
            return Ok(());
        };
        let Some(sequence) = &mut self.by_slot[slot.0] else {
            return Ok(());
        };
        let cached_tokens = accepted.cached_tokens;
        if cached_tokens > sequence.prompt_tokens {
            let rule = "accepted.cached_tokens must be at most the length of the prompt";
            return Err(Violation(rule.to_owned()));
        }
        if !std::mem::replace(&mut sequence.is_accepted, true) {
            self.effects.cached_tokens.push(cached_tokens);
            // If the reader is gone, the next sweep ends the sequence.
            let _ = self.slots.accept(slot, cached_tokens);
        }
        Ok(())
    }

    /// Handles the message `refused`: the worker does not run the sequence.
    pub(super) fn handle_refused(&mut self, refused: proto::Refused) {
        if let Some(&slot) = self.by_number.get(&refused.sequence) {
            let failure = Failure::Model(wire::model_error(refused.failure));
            let freed = self.slots.fail(slot, failure);
            self.release(freed);
        }
    }

    /// Passes a step's tokens to their readers, and grants more credit.
    ///
    /// # Errors
    /// Returns an error if the step violates the protocol.
    pub(super) fn handle_step(&mut self, step: proto::Step, now_ns: u64) -> Result<(), Violation> {
        wire::check_step(&step)?;
        for entry in step.sequences {
            // A sequence without an entry was cancelled or has ended here. Its late tokens are ignored.
            if let Some(&slot) = self.by_number.get(&entry.sequence) {
                self.apply(slot, entry, now_ns)?;
                self.grant_credit(slot);
            }
        }
        Ok(())
    }

    fn apply(
        &mut self,
        slot: Slot,
        mut entry: proto::SequenceStep,
        now_ns: u64,
    ) -> Result<(), Violation> {
        let sequence = self.by_slot[slot.0]
            .as_mut()
            .expect("each sequence in `by_number` occupies its slot");
        sequence.apply_step(&entry)?;
        let (end, is_prompt) = (entry.end(), entry.is_prompt);
        let failure = entry.failure.take();
        let tokens = wire::decode_tokens(&mut entry, self.vocabulary_size, now_ns)?;
        let freed = if is_prompt {
            let mut tokens = tokens;
            tokens.find_map(|token| self.slots.send_prompt_token(slot, token))
        } else {
            self.effects.tokens += u64::try_from(tokens.len()).unwrap_or(u64::MAX);
            self.slots
                .send_tokens(slot, tokens, end == proto::End::Stop)
        };
        let freed = freed.or_else(|| match end {
            proto::End::Unspecified | proto::End::Stop => None,
            proto::End::Length => self.slots.finish(slot, None, FinishReason::Length),
            proto::End::Failed => {
                let failure = Failure::Model(wire::model_error(failure));
                self.slots.fail(slot, failure)
            }
        });
        self.release(freed);
        Ok(())
    }

    /// The time of the next sweep, in nanoseconds of CLOCK_MONOTONIC; `u64::MAX` if none is needed.
    pub(super) fn next_sweep_ns(&self) -> u64 {
        self.slots.next_sweep_ns()
    }

    /// Ends every sequence whose reader is gone or too slow, or whose deadline has passed. Grants credit to sequences
    /// whose readers have read tokens.
    pub(super) fn end_overdue_and_grant_credit(&mut self, now_ns: u64) {
        for freed in self.slots.end_overdue(now_ns) {
            self.cancel(freed);
        }
        for slot in 0..self.by_slot.len() {
            self.grant_credit(Slot(slot));
        }
    }

    /// Ends all sequences with the same failure.
    pub(super) fn fail_all(&mut self, failure: &Failure) {
        for freed in self.slots.fail_all(failure) {
            self.cancel(freed);
        }
    }

    /// Closes all token channels without an end, and marks them as crashed.
    pub(super) fn crash_all(&mut self) {
        self.slots.crash_all();
    }

    fn cancel(&mut self, freed: FreedSlot) {
        let sequence = self.by_slot[freed.slot.0].as_ref();
        let number = sequence.map(|sequence| sequence.number);
        self.effects.cancelled.extend(number);
        self.release(Some(freed));
    }

    fn release(&mut self, freed: Option<FreedSlot>) {
        let Some(freed) = freed else {
            return;
        };
        if let Some(sequence) = self.by_slot[freed.slot.0].take() {
            self.by_number.remove(&sequence.number);
        }
        self.effects.released.push(freed.assignment);
    }

    fn grant_credit(&mut self, slot: Slot) {
        let Some(sequence) = &mut self.by_slot[slot.0] else {
            return;
        };
        if sequence.not_granted == 0 || !sequence.is_accepted {
            return;
        }
        let credit = self.slots.credit(slot);
        let tokens = credit
            .saturating_sub(sequence.credit)
            .min(sequence.not_granted);
        if tokens == 0 || (tokens < MIN_GRANT && sequence.credit > 0) {
            return;
        }
        sequence.credit += tokens;
        sequence.not_granted -= tokens;
        self.effects.grants.push(proto::Grant {
            sequence: sequence.number,
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        });
    }
}

impl RemoteSequence {
    /// Checks that a step's entry continues the sequence and stays within its credit. Records the progress.
    fn apply_step(&mut self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        if !self.is_accepted {
            return Err(self.violation("has tokens before it was accepted"));
        }
        let next = if entry.is_prompt {
            self.next_prompt_index
        } else {
            self.next_index
        };
        if entry.first_index != next {
            let first = entry.first_index;
            return Err(self.violation(&format!("has first_index {first}, expected {next}")));
        }
        let count = entry.ids.len();
        self.credit = self
            .credit
            .checked_sub(count)
            .ok_or_else(|| self.violation("has more tokens than credit"))?;
        if (self.wants_logprobs || entry.is_prompt) && entry.logprobs.len() != count {
            return Err(self.violation("has tokens without their log probabilities"));
        }
        let next = next.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        if entry.is_prompt {
            self.check_prompt(entry)?;
            self.next_prompt_index = next;
        } else {
            if self.scoring.is_some() && count > 0 {
                return Err(
                    self.violation("has completion tokens before the last of its prompt tokens")
                );
            }
            self.next_index = next;
        }
        self.check_end(entry)
    }

    /// Checks that prompt tokens were requested and match the prompt.
    fn check_prompt(&mut self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        let count = entry.ids.len();
        if count == 0 {
            return Ok(());
        }
        let remaining = self.scoring.as_ref().and_then(|prompt| {
            let received = usize::try_from(self.next_prompt_index).ok()?;
            prompt.get(received..)?.split_at_checked(count)
        });
        let Some((expected, rest)) = remaining else {
            return Err(self.violation("has prompt tokens that were not requested"));
        };
        if !entry.ids.iter().eq(expected.iter().copied()) {
            return Err(self.violation("has prompt tokens that differ from its prompt"));
        }
        if rest.is_empty() {
            self.scoring = None;
        }
        Ok(())
    }

    /// Checks that the sequence may end in the way that the entry claims.
    fn check_end(&self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        let problem = match entry.end() {
            proto::End::Unspecified | proto::End::Failed => return Ok(()),
            proto::End::Stop | proto::End::Length if self.scoring.is_some() => {
                "before the last of its prompt tokens"
            }
            proto::End::Stop if entry.is_prompt => "with END_STOP on a prompt token",
            proto::End::Stop if entry.ids.is_empty() => "with END_STOP but without a token",
            proto::End::Stop if self.next_index < self.min_tokens => {
                "with END_STOP before it has min_tokens"
            }
            proto::End::Length if self.next_index < self.max_tokens => {
                "with END_LENGTH before it has max_tokens"
            }
            proto::End::Stop | proto::End::Length => return Ok(()),
        };
        Err(self.violation(&format!("ends {problem}")))
    }

    fn violation(&self, problem: &str) -> Violation {
        Violation(format!("sequence {} {problem}", self.number))
    }
}
