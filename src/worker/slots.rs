//! The slots of a worker: the sequence in each, its token channel, its deadline and its reader's progress.
//!
//! This module must not touch the device. The step loop passes the device's tokens to it.

use std::cell::Cell;

use tokio::time::Instant;

use super::token_channel::{Failure, SendOutcome, TokenSender};
use super::{Assignment, AssignmentId};
use crate::request::{FinishReason, RequestId};
use crate::runner::{ModelError, Slot, SlotCredit, Token, monotonic_ns};

/// All slots of one worker.
pub(super) struct Slots {
    occupants: Vec<Option<OccupiedSlot>>,
    free: Vec<Slot>,
    slow_reader_ns: u64,
    /// Lower bound of all deadlines, in nanoseconds of CLOCK_MONOTONIC. If the sequence with the earliest deadline
    /// has ended, the bound is too early; [`Slots::end_overdue`] then computes it again.
    next_deadline_ns: u64,
    /// True if a token channel was found full since the last sweep.
    any_stalled: Cell<bool>,
    /// Number of crash suspects that have produced a token or ended since the last [`Slots::take_cleared_suspects`].
    cleared: usize,
}

/// The sequence in one slot.
struct OccupiedSlot {
    assignment: AssignmentId,
    request_id: RequestId,
    token_channel: TokenSender,
    /// Number of prompt tokens still to be sent. 0 if the request does not ask for prompt tokens.
    prompt_left: usize,
    /// Number of completion tokens so far, including those that the client had before a resumption.
    token_count: u32,
    max_tokens: u32,
    is_suspect: bool,
    deadline_ns: u64,
    /// Time at which the token channel was first found full; 0 while it has room.
    stalled_ns: Cell<u64>,
}

impl Assignment {
    /// Computes the deadline of a sequence that needs a slot. Returns `None` for any other sequence, and ends it: the
    /// sequence has expired, its reader is gone, or it requests no tokens.
    pub(super) fn into_runnable(self) -> Option<RunnableSequence> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.token_channel.fail(Failure::DeadlineExceeded);
            return None;
        }
        let requests_nothing = self.sequence.max_tokens == 0 && !self.sequence.scores_prompt;
        if requests_nothing {
            if self.token_channel.accept(0) == SendOutcome::Delivered {
                self.token_channel.finish(None, FinishReason::Length);
            }
            return None;
        }
        let left_ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        let deadline_ns = monotonic_ns().saturating_add(left_ns);
        (!self.token_channel.is_closed()).then_some(RunnableSequence {
            assignment: self,
            deadline_ns,
        })
    }
}

/// A sequence that needs a slot.
pub(super) struct RunnableSequence {
    pub(super) assignment: Assignment,
    /// Deadline in nanoseconds of CLOCK_MONOTONIC.
    pub(super) deadline_ns: u64,
}

/// A slot that has become free, with facts about the sequence that had it.
pub(super) struct FreedSlot {
    pub(super) slot: Slot,
    pub(super) request_id: RequestId,
    pub(super) assignment: AssignmentId,
}

/// A sequence that was removed from its slot, and the slot.
struct EndedSequence {
    occupant: OccupiedSlot,
    freed: FreedSlot,
}

impl Slots {
    pub(super) fn new(count: usize, slow_reader_ns: u64) -> Self {
        Self {
            occupants: (0..count).map(|_| None).collect(),
            free: (0..count).rev().map(Slot).collect(),
            slow_reader_ns,
            next_deadline_ns: u64::MAX,
            any_stalled: Cell::new(false),
            cleared: 0,
        }
    }

    /// Returns and resets the number of crash suspects cleared since the last call.
    pub(super) fn take_cleared_suspects(&mut self) -> usize {
        std::mem::take(&mut self.cleared)
    }

    /// Closes all token channels without an end, and marks them as crashed.
    pub(super) fn crash_all(&mut self) {
        for occupant in self.occupants.iter_mut().filter_map(Option::take) {
            occupant.token_channel.crash();
        }
    }

    /// Reports that the sequence in this slot is accepted, and that the device reuses `cached_tokens` tokens of its
    /// prompt.
    pub(super) fn accept(&self, slot: Slot, cached_tokens: u32) -> Option<SendOutcome> {
        let occupant = self.occupants.get(slot.0)?.as_ref()?;
        Some(occupant.token_channel.accept(cached_tokens))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.occupants.len()
    }

    /// Number of occupied slots, as a float for the gauge.
    pub(super) fn count(&self) -> f64 {
        let count = self.occupants.len() - self.free.len();
        u32::try_from(count).map_or(f64::from(u32::MAX), f64::from)
    }

    /// Returns the free slots. The last one was freed last.
    pub(super) fn free(&self) -> &[Slot] {
        &self.free
    }

    /// Puts a sequence into `slot`, which must be free.
    pub(super) fn occupy(&mut self, slot: Slot, runnable: RunnableSequence) {
        let RunnableSequence {
            assignment,
            deadline_ns,
        } = runnable;
        // The search starts at the end, because a runner without a prefix cache chooses the last slot of the list.
        let position = self.free.iter().rposition(|free| *free == slot);
        debug_assert!(position.is_some(), "the slot is free");
        if let Some(position) = position {
            self.free.remove(position);
        }
        self.next_deadline_ns = self.next_deadline_ns.min(deadline_ns);
        let sequence = &assignment.sequence;
        let prompt_left = if sequence.scores_prompt {
            sequence.prompt.len()
        } else {
            0
        };
        self.occupants[slot.0] = Some(OccupiedSlot {
            assignment: assignment.id,
            request_id: sequence.request_id.clone(),
            prompt_left,
            token_count: u32::try_from(sequence.delivered.len()).unwrap_or(u32::MAX),
            max_tokens: sequence.max_tokens,
            is_suspect: assignment.is_suspect,
            token_channel: assignment.token_channel,
            deadline_ns,
            stalled_ns: Cell::new(0),
        });
    }

    /// Sends a prompt token to its reader. Returns the slot if the sequence has ended.
    pub(super) fn send_prompt_token(&mut self, slot: Slot, token: Token) -> Option<FreedSlot> {
        let occupant = self.occupants.get_mut(slot.0)?.as_mut()?;
        occupant.prompt_left = occupant.prompt_left.saturating_sub(1);
        let is_last = occupant.prompt_left == 0 && occupant.max_tokens == 0;
        let outcome = occupant.token_channel.send_prompt_token(token);
        if is_last && outcome == SendOutcome::Delivered {
            return self.finish(slot, None, FinishReason::Length);
        }
        self.handle_outcome(slot, outcome)
    }

    /// Sends a completion token to its reader. Returns the slot if the sequence has ended.
    pub(super) fn send_token(&mut self, slot: Slot, token: Token) -> Option<FreedSlot> {
        let occupant = self.occupants.get_mut(slot.0)?.as_mut()?;
        occupant.token_count += 1;
        self.cleared += usize::from(std::mem::take(&mut occupant.is_suspect));
        if occupant.token_count >= occupant.max_tokens {
            return self.finish(slot, Some(token), FinishReason::Length);
        }
        let outcome = occupant.token_channel.send_token(token);
        self.handle_outcome(slot, outcome)
    }

    /// Sends the completion tokens of one step to their reader. If `ends` is true, the last token stops the sequence.
    /// Returns the slot if the sequence has ended.
    pub(super) fn send_tokens(
        &mut self,
        slot: Slot,
        mut tokens: impl ExactSizeIterator<Item = Token>,
        ends: bool,
    ) -> Option<FreedSlot> {
        let occupant = self.occupants.get_mut(slot.0)?.as_mut()?;
        let count = tokens.len();
        if count == 0 {
            return None;
        }
        self.cleared += usize::from(std::mem::take(&mut occupant.is_suspect));
        let new_tokens = u32::try_from(count).unwrap_or(u32::MAX);
        occupant.token_count = occupant.token_count.saturating_add(new_tokens);
        let reason = if ends {
            Some(FinishReason::Stop)
        } else {
            (occupant.token_count >= occupant.max_tokens).then_some(FinishReason::Length)
        };
        let count_before_end = count - usize::from(reason.is_some());
        let freed = if count_before_end == 0 {
            None
        } else {
            let outcome = occupant
                .token_channel
                .send_tokens(tokens.by_ref().take(count_before_end));
            self.handle_outcome(slot, outcome)
        };
        match reason {
            Some(reason) if freed.is_none() => self.finish(slot, tokens.next(), reason),
            Some(_) | None => freed,
        }
    }

    /// Frees the slot if the reader is gone, or if the runner emitted more tokens than the sequence has credit for.
    fn handle_outcome(&mut self, slot: Slot, outcome: SendOutcome) -> Option<FreedSlot> {
        match outcome {
            SendOutcome::Delivered => None,
            SendOutcome::Closed => self.free_slot(slot).map(|ended| ended.freed),
            SendOutcome::NoCredit => {
                let error =
                    "the runner emitted more tokens than the sequence had credit for".to_owned();
                self.fail(slot, Failure::Model(ModelError::Failed(error)))
            }
        }
    }

    /// Ends a sequence successfully. `token` is its last token, if that was not sent before.
    pub(super) fn finish(
        &mut self,
        slot: Slot,
        token: Option<Token>,
        reason: FinishReason,
    ) -> Option<FreedSlot> {
        let EndedSequence { occupant, freed } = self.free_slot(slot)?;
        occupant.token_channel.finish(token, reason);
        Some(freed)
    }

    /// Ends a sequence with a failure.
    pub(super) fn fail(&mut self, slot: Slot, failure: Failure) -> Option<FreedSlot> {
        let EndedSequence { occupant, freed } = self.free_slot(slot)?;
        let (id, reason) = (&freed.request_id.0, failure_reason(&failure));
        tracing::debug!(%id, slot = slot.0, reason, "a sequence fails");
        occupant.token_channel.fail(failure);
        Some(freed)
    }

    /// Returns true if a deadline or a slow-reader timeout may have passed, so [`Slots::end_overdue`] must be called.
    pub(super) fn sweep_is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.next_sweep_ns()
    }

    /// The time of the next sweep, in nanoseconds of CLOCK_MONOTONIC; `u64::MAX` if none is needed.
    pub(super) fn next_sweep_ns(&self) -> u64 {
        if !self.any_stalled.get() {
            return self.next_deadline_ns;
        }
        let stalled = self
            .occupants
            .iter()
            .flatten()
            .map(|occupant| occupant.stalled_ns.get());
        let first = stalled.filter(|since| *since > 0).min();
        let reader_timeout_ns =
            first.map_or(u64::MAX, |since| since.saturating_add(self.slow_reader_ns));
        self.next_deadline_ns.min(reader_timeout_ns)
    }

    /// Ends every sequence whose reader is gone or too slow, or whose deadline has passed.
    pub(super) fn end_overdue(&mut self, now_ns: u64) -> Vec<FreedSlot> {
        let mut freed = Vec::new();
        self.next_deadline_ns = u64::MAX;
        self.any_stalled.set(false);
        for index in 0..self.occupants.len() {
            let Some(occupant) = &self.occupants[index] else {
                continue;
            };
            let slot = Slot(index);
            if occupant.token_channel.is_closed() {
                freed.extend(self.free_slot(slot).map(|ended| ended.freed));
            } else if now_ns >= occupant.deadline_ns {
                freed.extend(self.fail(slot, Failure::DeadlineExceeded));
            } else if occupant.has_stalled_for(self.slow_reader_ns, now_ns) {
                freed.extend(self.fail(slot, Failure::SlowReader));
            } else {
                self.next_deadline_ns = self.next_deadline_ns.min(occupant.deadline_ns);
                self.any_stalled
                    .set(self.any_stalled.get() || occupant.stalled_ns.get() > 0);
            }
        }
        freed
    }

    /// Ends all sequences with the same failure.
    pub(super) fn fail_all(&mut self, failure: &Failure) -> Vec<FreedSlot> {
        (0..self.occupants.len())
            .filter_map(|at| self.fail(Slot(at), failure.clone()))
            .collect()
    }

    fn free_slot(&mut self, slot: Slot) -> Option<EndedSequence> {
        let occupant = self.occupants.get_mut(slot.0)?.take()?;
        self.free.push(slot);
        self.cleared += usize::from(occupant.is_suspect);
        let freed = FreedSlot {
            slot,
            request_id: occupant.request_id.clone(),
            assignment: occupant.assignment,
        };
        Some(EndedSequence { occupant, freed })
    }
}

/// Describes a failure for the log, without any text from the client.
fn failure_reason(failure: &Failure) -> &'static str {
    match failure {
        Failure::Model(ModelError::Invalid(_)) => "invalid request",
        Failure::Model(ModelError::Unavailable(_)) => "model unavailable",
        Failure::Model(ModelError::Failed(_)) => "model error",
        Failure::SlowReader => "slow reader",
        Failure::DeadlineExceeded => "deadline exceeded",
        Failure::Draining => "draining",
        Failure::Displaced => "displaced",
    }
}

impl OccupiedSlot {
    /// Returns true if the token channel has been full for at least `limit_ns`. If the channel has room again, the
    /// time starts anew.
    fn has_stalled_for(&self, limit_ns: u64, now_ns: u64) -> bool {
        let since = self.stalled_ns.get();
        if since == 0 {
            return false;
        }
        if self.token_channel.credit() > 0 {
            self.stalled_ns.set(0);
            return false;
        }
        now_ns.saturating_sub(since) >= limit_ns
    }
}

impl SlotCredit for Slots {
    fn credit(&self, slot: Slot) -> usize {
        let Some(Some(occupant)) = self.occupants.get(slot.0) else {
            return 0;
        };
        let credit = occupant.token_channel.credit();
        if credit == 0 && occupant.stalled_ns.get() == 0 {
            occupant.stalled_ns.set(monotonic_ns());
            self.any_stalled.set(true);
        } else if credit > 0 {
            occupant.stalled_ns.set(0);
        }
        credit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::TokenBytes;
    use crate::worker::token_channel::TokenReceiver;

    const SLOW_READER_NS: u64 = 1_000_000_000;
    const NO_DEADLINE: u64 = u64::MAX;
    /// A time after every slow-reader timeout, but before `NO_DEADLINE`.
    const FAR_FUTURE_NS: u64 = u64::MAX - 1;

    fn token() -> Token {
        Token {
            id: 0,
            bytes: TokenBytes::new(),
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        }
    }

    /// Creates one slot, with a sequence whose token channel is full.
    fn full_channel() -> (Slots, TokenReceiver) {
        let mut slots = Slots::new(1, SLOW_READER_NS);
        let (assignment, receiver) = Assignment::for_test(100, Instant::now());
        let runnable = RunnableSequence {
            assignment,
            deadline_ns: NO_DEADLINE,
        };
        slots.occupy(Slot(0), runnable);
        assert!(slots.send_token(Slot(0), token()).is_none());
        assert_eq!(slots.credit(Slot(0)), 0);
        (slots, receiver)
    }

    async fn read(receiver: &mut TokenReceiver) {
        let mut outputs = Vec::new();
        std::future::poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, 16)).await;
    }

    #[test]
    fn a_reader_that_stops_reading_is_dropped_after_the_slow_reader_timeout() {
        let (mut slots, _reader) = full_channel();
        let due = slots.next_sweep_ns();
        assert!(slots.end_overdue(due - 1).is_empty());
        assert_eq!(slots.next_sweep_ns(), due);
        assert_eq!(slots.end_overdue(due).len(), 1);
    }

    #[tokio::test]
    async fn a_reader_that_makes_progress_gets_the_full_timeout_again() {
        let (mut slots, mut reader) = full_channel();
        read(&mut reader).await;
        assert!(slots.end_overdue(FAR_FUTURE_NS).is_empty());
        assert!(
            !slots.sweep_is_due(FAR_FUTURE_NS),
            "no reader is stalled any more"
        );
    }
}
