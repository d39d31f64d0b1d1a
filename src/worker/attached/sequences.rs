//! The sequences on a worker that is elsewhere: which are under way, how far each has come, and how much
//! credit it has left.
//!
//! It sends nothing: what is to be told, to the worker or to the scheduler, is gathered in [`Effects`].

use std::collections::HashMap;
use std::sync::Arc;

use crate::proto::worker as proto;
use crate::request::{FinishReason, TokenId};
use crate::runner::{Slot, SlotCredit, monotonic_ns};
use crate::worker::Assignment;
use crate::worker::slots::{Freed, Slots};
use crate::worker::token_channel::Failure;
use crate::worker::wire::{self, SequenceId, Violation};

/// A sequence is given more credit once it can have so much at once, or has none left.
const GRANT: usize = 128;

/// Every sequence of one worker's life.
pub(super) struct Sequences {
    slots: Slots,
    /// By slot.
    under_way: Vec<Option<RemoteSequence>>,
    by_number: HashMap<u64, Slot>,
    /// Every id below this is a token.
    vocabulary_size: u32,
    /// The worker's life; and the last sequence's number, which count on over all lives.
    last: SequenceId,
    effects: Effects,
}

/// A sequence that the worker has.
struct RemoteSequence {
    number: u64,
    submitted_ns: u64,
    is_accepted: bool,
    /// Whether each of its tokens is to come with its log probabilities.
    wants_logprobs: bool,
    next_index: u32,
    next_of_prompt: u32,
    /// The prompt, while not all of its tokens have come that are asked for.
    scoring: Option<Arc<[TokenId]>>,
    max_tokens: u32,
    min_tokens: u32,
    /// How many tokens it may emit before it is given more credit.
    credit: usize,
    /// How many tokens it has not been given credit for.
    not_granted: usize,
}

/// What is to be told.
#[derive(Default)]
pub(super) struct Effects {
    /// To the worker: that these have more credit.
    pub(super) grants: Vec<proto::Grant>,
    /// To the worker: that nobody waits for these any more.
    pub(super) cancelled: Vec<u64>,
    /// To the scheduler: what the sequences had asked for whose slots are free.
    pub(super) released: Vec<u32>,
    /// To the scheduler: how many suspects are none any more.
    pub(super) cleared: usize,
    /// To the metrics: tokens of completions.
    pub(super) tokens: u64,
}

impl Sequences {
    /// None yet, on a worker with so many slots, in this life; the last sequence of the life before had this
    /// number.
    pub(super) fn new(slots: usize, slow_reader_ns: u64, last: SequenceId) -> Self {
        Self {
            slots: Slots::new(slots, slow_reader_ns),
            under_way: (0..slots).map(|_| None).collect(),
            by_number: HashMap::new(),
            vocabulary_size: u32::MAX,
            last,
            effects: Effects::default(),
        }
    }

    /// Of a model with so many tokens.
    pub(super) fn of(self, vocabulary_size: u32) -> Self {
        Self {
            vocabulary_size,
            ..self
        }
    }

    /// The number of the last sequence.
    pub(super) fn last_number(&self) -> u64 {
        self.last.number
    }

    /// How many there are, as a gauge counts.
    pub(super) fn count(&self) -> f64 {
        self.slots.count()
    }

    /// When the sequence was submitted that has waited longest for the worker to take it.
    pub(super) fn waits_since_ns(&self) -> Option<u64> {
        let waiting = self.under_way.iter().flatten().filter(|it| !it.is_accepted);
        waiting.map(|it| it.submitted_ns).min()
    }

    /// What is to be told since this was last asked.
    pub(super) fn take_effects(&mut self) -> Effects {
        self.effects.cleared += self.slots.take_cleared();
        std::mem::take(&mut self.effects)
    }

    /// Takes a sequence, and says what the worker is to be told; nothing where it has ended already.
    pub(super) fn submit(&mut self, assignment: Assignment) -> Option<proto::Submit> {
        let max_tokens = assignment.sequence.max_tokens;
        let Some((assignment, deadline_ns)) = assignment.if_still_wanted() else {
            self.effects.released.push(max_tokens);
            return None;
        };
        let Some(slot) = self.slots.next_free() else {
            tracing::error!("the scheduler assigned a sequence to a worker without a free slot");
            self.effects.released.push(max_tokens);
            return None;
        };
        self.last.number += 1;
        let (number, sequence) = (self.last.number, &assignment.sequence);
        let delivered = sequence.delivered.len();
        let scoring = sequence.scores_prompt.then(|| Arc::clone(&sequence.prompt));
        let scored = scoring.as_ref().map_or(0, |prompt| prompt.len());
        let wanted = usize::try_from(max_tokens).unwrap_or(usize::MAX);
        let wanted = wanted.saturating_sub(delivered).saturating_add(scored);
        let credit = assignment.token_channel.credit().clamp(1, wanted.max(1));
        let credit_given = u32::try_from(credit).unwrap_or(u32::MAX);
        let submit = wire::submit(sequence, self.last, credit_given);
        self.under_way[slot.0] = Some(RemoteSequence {
            number,
            submitted_ns: monotonic_ns(),
            is_accepted: false,
            wants_logprobs: sequence.logprobs.is_some(),
            next_index: u32::try_from(delivered).unwrap_or(u32::MAX),
            next_of_prompt: 0,
            scoring,
            max_tokens,
            min_tokens: sequence.stop_tokens.min_tokens,
            credit,
            not_granted: wanted.saturating_sub(credit),
        });
        self.by_number.insert(number, slot);
        self.slots.occupy(slot, assignment, deadline_ns);
        Some(submit)
    }

    /// The worker has a sequence.
    pub(super) fn accepted(&mut self, number: u64) {
        let Some(&slot) = self.by_number.get(&number) else {
            return;
        };
        if let Some(under_way) = &mut self.under_way[slot.0]
            && !std::mem::replace(&mut under_way.is_accepted, true)
        {
            // A reader that has gone is found by the next look.
            let _ = self.slots.accept(slot);
        }
    }

    /// The worker does not run a sequence.
    pub(super) fn refused(&mut self, refused: proto::Refused) {
        if let Some(&slot) = self.by_number.get(&refused.sequence) {
            let failure = Failure::Model(wire::model_error(refused.failure));
            let freed = self.slots.fail(slot, failure);
            self.forget(freed);
        }
    }

    /// Passes on what a step made, and gives credit to those who may have more.
    ///
    /// # Errors
    /// When the worker breaks a rule.
    pub(super) fn step(&mut self, step: proto::Step, now_ns: u64) -> Result<(), Violation> {
        wire::check_step(&step)?;
        for entry in step.sequences {
            // One that was cancelled, or has ended here, may still have tokens on their way.
            if let Some(&slot) = self.by_number.get(&entry.sequence) {
                self.take(slot, entry, now_ns)?;
                self.give_credit(slot);
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        slot: Slot,
        mut entry: proto::SequenceStep,
        now_ns: u64,
    ) -> Result<(), Violation> {
        let under_way = self.under_way[slot.0]
            .as_mut()
            .expect("what has a number is under way");
        under_way.check(&entry)?;
        let (end, is_prompt) = (entry.end(), entry.is_prompt);
        let failure = entry.failure.take();
        let tokens = wire::tokens(&mut entry, self.vocabulary_size, now_ns)?;
        let freed = if is_prompt {
            let mut tokens = tokens;
            tokens.find_map(|token| self.slots.prompt(slot, token))
        } else {
            self.effects.tokens += u64::try_from(tokens.len()).unwrap_or(u64::MAX);
            self.slots.tokens(slot, tokens, end == proto::End::Stop)
        };
        let freed = freed.or_else(|| match end {
            proto::End::Unspecified | proto::End::Stop => None,
            proto::End::Length => self.slots.finish(slot, None, FinishReason::Length),
            proto::End::Failed => {
                let failure = Failure::Model(wire::model_error(failure));
                self.slots.fail(slot, failure)
            }
        });
        self.forget(freed);
        Ok(())
    }

    /// When the clock is to be looked at again.
    pub(super) fn next_look_ns(&self) -> u64 {
        self.slots.next_look_ns()
    }

    /// Ends what nobody waits for, and gives credit to those whose readers have read.
    pub(super) fn look(&mut self, now_ns: u64) {
        for freed in self.slots.look(now_ns) {
            self.cancel(freed);
        }
        for slot in 0..self.under_way.len() {
            self.give_credit(Slot(slot));
        }
    }

    /// Ends everything with the same failure.
    pub(super) fn fail_all(&mut self, failure: &Failure) {
        for freed in self.slots.fail_all(failure) {
            self.cancel(freed);
        }
    }

    /// Closes every token_channel without an end, because the device crashed.
    pub(super) fn crash_all(&mut self) {
        self.slots.crash_all();
    }

    fn cancel(&mut self, freed: Freed) {
        let under_way = self.under_way[freed.slot.0].as_ref();
        let number = under_way.map(|under_way| under_way.number);
        self.effects.cancelled.extend(number);
        self.forget(Some(freed));
    }

    fn forget(&mut self, freed: Option<Freed>) {
        let Some(freed) = freed else {
            return;
        };
        if let Some(under_way) = self.under_way[freed.slot.0].take() {
            self.by_number.remove(&under_way.number);
        }
        self.effects.released.push(freed.max_tokens);
    }

    fn give_credit(&mut self, slot: Slot) {
        let Some(under_way) = &mut self.under_way[slot.0] else {
            return;
        };
        if under_way.not_granted == 0 || !under_way.is_accepted {
            return;
        }
        let credit = self.slots.credit(slot);
        let tokens = credit
            .saturating_sub(under_way.credit)
            .min(under_way.not_granted);
        if tokens == 0 || (tokens < GRANT && under_way.credit > 0) {
            return;
        }
        under_way.credit += tokens;
        under_way.not_granted -= tokens;
        self.effects.grants.push(proto::Grant {
            sequence: under_way.number,
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        });
    }
}

impl RemoteSequence {
    /// Whether what a step made follows what came before, and was allowed.
    fn check(&mut self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        if !self.is_accepted {
            return Err(self.broke("has tokens before it was accepted"));
        }
        let next = if entry.is_prompt {
            self.next_of_prompt
        } else {
            self.next_index
        };
        if entry.first_index != next {
            let first = entry.first_index;
            return Err(self.broke(&format!("goes on at {first}, where {next} was next")));
        }
        let count = entry.ids.len();
        self.credit = self
            .credit
            .checked_sub(count)
            .ok_or_else(|| self.broke("has more tokens than it had credit for"))?;
        if (self.wants_logprobs || entry.is_prompt) && entry.logprobs.len() != count {
            return Err(self.broke("has tokens without their log probabilities"));
        }
        let next = next.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        if entry.is_prompt {
            self.check_prompt(entry)?;
            self.next_of_prompt = next;
        } else {
            if self.scoring.is_some() && count > 0 {
                return Err(self.broke("has tokens before all of its prompt's"));
            }
            self.next_index = next;
        }
        self.check_end(entry)
    }

    /// Whether these are the prompt's own tokens, and were asked for.
    fn check_prompt(&mut self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        let count = entry.ids.len();
        if count == 0 {
            return Ok(());
        }
        let left = self.scoring.as_ref().and_then(|prompt| {
            let come = usize::try_from(self.next_of_prompt).ok()?;
            prompt.get(come..)?.split_at_checked(count)
        });
        let Some((expected, rest)) = left else {
            return Err(self.broke("has tokens of its prompt that nobody asked for"));
        };
        if !entry.ids.iter().eq(expected.iter().copied()) {
            return Err(self.broke("has other tokens for its prompt's than it has"));
        }
        if rest.is_empty() {
            self.scoring = None;
        }
        Ok(())
    }

    /// Whether it may end so, with all that has come.
    fn check_end(&self, entry: &proto::SequenceStep) -> Result<(), Violation> {
        let how = match entry.end() {
            proto::End::Unspecified | proto::End::Failed => return Ok(()),
            proto::End::Stop | proto::End::Length if self.scoring.is_some() => {
                "before it has all of its prompt's tokens"
            }
            proto::End::Stop if entry.is_prompt => "with END_STOP and a token of its prompt",
            proto::End::Stop if entry.ids.is_empty() => "with END_STOP and no token",
            proto::End::Stop if self.next_index < self.min_tokens => {
                "with END_STOP before it has min_tokens"
            }
            proto::End::Length if self.next_index < self.max_tokens => {
                "with END_LENGTH before it has max_tokens"
            }
            proto::End::Stop | proto::End::Length => return Ok(()),
        };
        Err(self.broke(&format!("ends {how}")))
    }

    fn broke(&self, how: &str) -> Violation {
        Violation(format!("sequence {} {how}", self.number))
    }
}
