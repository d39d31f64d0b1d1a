//! The sequences that a worker runs, slot by slot: who has credit, who has gone, who took too long.
//!
//! It touches no device: the step loop tells it what the device made.

use std::cell::Cell;

use tokio::time::Instant;

use super::Assignment;
use super::token_channel::{Failure, SendOutcome, TokenSender};
use crate::request::FinishReason;
use crate::runner::{Slot, SlotCredit, Token, monotonic_ns};

/// All slots of one worker.
pub(super) struct Slots {
    running: Vec<Option<Running>>,
    free: Vec<Slot>,
    slow_reader_ns: u64,
    /// The earliest deadline of any sequence, or later: a sequence that ended may have had it.
    next_deadline_ns: u64,
    /// Whether a token_channel has been found full since the last look.
    any_stalled: Cell<bool>,
    /// How many suspects have made a token, or ended, since that was last asked.
    cleared: usize,
}

struct Running {
    token_channel: TokenSender,
    /// How many of the prompt's tokens are still to be sent, where they are asked for.
    prompt_left: usize,
    made: u32,
    max_tokens: u32,
    is_suspect: bool,
    deadline_ns: u64,
    /// When the token_channel was first found full; 0 while it has credit.
    stalled_ns: Cell<u64>,
}

impl Assignment {
    /// What its device is to run, with its deadline by CLOCK_MONOTONIC; `None` where it has ended here: it has
    /// expired, nobody waits for it, or it asks for nothing.
    pub(super) fn if_still_wanted(self) -> Option<(Self, u64)> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.token_channel.fail(Failure::DeadlineExceeded);
            return None;
        }
        let asks_nothing = self.sequence.max_tokens == 0 && !self.sequence.scores_prompt;
        if asks_nothing {
            if self.token_channel.accept() == SendOutcome::Delivered {
                self.token_channel.finish(None, FinishReason::Length);
            }
            return None;
        }
        let left_ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        let deadline_ns = monotonic_ns().saturating_add(left_ns);
        (!self.token_channel.is_closed()).then_some((self, deadline_ns))
    }
}

/// A slot that has become free, and what its sequence had asked for.
pub(super) struct Freed {
    pub(super) slot: Slot,
    pub(super) max_tokens: u32,
}

impl Slots {
    pub(super) fn new(count: usize, slow_reader_ns: u64) -> Self {
        Self {
            running: (0..count).map(|_| None).collect(),
            free: (0..count).rev().map(Slot).collect(),
            slow_reader_ns,
            next_deadline_ns: u64::MAX,
            any_stalled: Cell::new(false),
            cleared: 0,
        }
    }

    /// How many suspects are none any more, since that was last asked.
    pub(super) fn take_cleared(&mut self) -> usize {
        std::mem::take(&mut self.cleared)
    }

    /// Closes every token_channel without an end, because the device crashed.
    pub(super) fn crash_all(&mut self) {
        for running in self.running.iter_mut().filter_map(Option::take) {
            running.token_channel.crash();
        }
    }

    /// Says that a sequence has its slot.
    pub(super) fn accept(&self, slot: Slot) -> Option<SendOutcome> {
        let running = self.running.get(slot.0)?.as_ref()?;
        Some(running.token_channel.accept())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.running.len()
    }

    /// How many sequences there are, as a gauge counts.
    pub(super) fn count(&self) -> f64 {
        let count = self.running.len() - self.free.len();
        u32::try_from(count).map_or(f64::from(u32::MAX), f64::from)
    }

    /// The slot that the next sequence will take.
    pub(super) fn next_free(&self) -> Option<Slot> {
        self.free.last().copied()
    }

    /// Puts a sequence into the next free slot.
    pub(super) fn occupy(&mut self, slot: Slot, assignment: Assignment, deadline_ns: u64) {
        debug_assert_eq!(self.next_free(), Some(slot));
        self.free.pop();
        self.next_deadline_ns = self.next_deadline_ns.min(deadline_ns);
        let sequence = &assignment.sequence;
        let prompt_left = if sequence.scores_prompt {
            sequence.prompt.len()
        } else {
            0
        };
        self.running[slot.0] = Some(Running {
            prompt_left,
            made: u32::try_from(sequence.delivered.len()).unwrap_or(u32::MAX),
            max_tokens: sequence.max_tokens,
            is_suspect: assignment.is_suspect,
            token_channel: assignment.token_channel,
            deadline_ns,
            stalled_ns: Cell::new(0),
        });
    }

    /// Sends a token of the prompt to its reader. `Some` when the slot became free by it.
    pub(super) fn prompt(&mut self, slot: Slot, token: Token) -> Option<Freed> {
        let running = self.running.get_mut(slot.0)?.as_mut()?;
        running.prompt_left = running.prompt_left.saturating_sub(1);
        let is_all = running.prompt_left == 0 && running.max_tokens == 0;
        let sent = running.token_channel.prompt(token);
        if is_all && sent == SendOutcome::Delivered {
            return self.finish(slot, None, FinishReason::Length);
        }
        self.after(slot, sent)
    }

    /// Sends a token to its reader. `Some` when the slot became free by it.
    pub(super) fn token(&mut self, slot: Slot, token: Token) -> Option<Freed> {
        let running = self.running.get_mut(slot.0)?.as_mut()?;
        running.made += 1;
        self.cleared += usize::from(std::mem::take(&mut running.is_suspect));
        if running.made >= running.max_tokens {
            return self.finish(slot, Some(token), FinishReason::Length);
        }
        let sent = running.token_channel.token(token);
        self.after(slot, sent)
    }

    /// Sends tokens that were made together to their reader; with the last of them the sequence may have come to an
    /// end of its own. `Some` when the slot became free by them.
    pub(super) fn tokens(
        &mut self,
        slot: Slot,
        mut tokens: impl ExactSizeIterator<Item = Token>,
        ends: bool,
    ) -> Option<Freed> {
        let running = self.running.get_mut(slot.0)?.as_mut()?;
        let count = tokens.len();
        if count == 0 {
            return None;
        }
        self.cleared += usize::from(std::mem::take(&mut running.is_suspect));
        let made = u32::try_from(count).unwrap_or(u32::MAX);
        running.made = running.made.saturating_add(made);
        let reason = if ends {
            Some(FinishReason::Stop)
        } else {
            (running.made >= running.max_tokens).then_some(FinishReason::Length)
        };
        let before = count - usize::from(reason.is_some());
        let freed = if before == 0 {
            None
        } else {
            let sent = running.token_channel.tokens(tokens.by_ref().take(before));
            self.after(slot, sent)
        };
        match reason {
            Some(reason) if freed.is_none() => self.finish(slot, tokens.next(), reason),
            Some(_) | None => freed,
        }
    }

    /// What becomes of a slot whose token was sent so.
    fn after(&mut self, slot: Slot, sent: SendOutcome) -> Option<Freed> {
        match sent {
            SendOutcome::Delivered => None,
            SendOutcome::Closed => self.vacate(slot).map(|(_, freed)| freed),
            SendOutcome::NoRoom => {
                tracing::error!(
                    slot = slot.0,
                    "the runner emitted a token without credit for it"
                );
                let error = "the runner emitted a token without credit for it".to_owned();
                self.fail(
                    slot,
                    Failure::Model(crate::runner::ModelError::Failed(error)),
                )
            }
        }
    }

    /// Ends a sequence well.
    pub(super) fn finish(
        &mut self,
        slot: Slot,
        token: Option<Token>,
        reason: FinishReason,
    ) -> Option<Freed> {
        let (running, freed) = self.vacate(slot)?;
        running.token_channel.finish(token, reason);
        Some(freed)
    }

    /// Ends a sequence with a failure.
    pub(super) fn fail(&mut self, slot: Slot, failure: Failure) -> Option<Freed> {
        let (running, freed) = self.vacate(slot)?;
        running.token_channel.fail(failure);
        Some(freed)
    }

    /// Whether a look at every slot is due by the clock: a deadline, or a reader's patience, may have
    /// run out.
    pub(super) fn look_due(&self, now_ns: u64) -> bool {
        now_ns >= self.next_look_ns()
    }

    /// When the next look by the clock is due.
    pub(super) fn next_look_ns(&self) -> u64 {
        if !self.any_stalled.get() {
            return self.next_deadline_ns;
        }
        let stalled = self
            .running
            .iter()
            .flatten()
            .map(|running| running.stalled_ns.get());
        let first = stalled.filter(|since| *since > 0).min();
        let patience_ends =
            first.map_or(u64::MAX, |since| since.saturating_add(self.slow_reader_ns));
        self.next_deadline_ns.min(patience_ends)
    }

    /// Looks at every slot and ends what nobody waits for: the reader went away, stopped reading, or
    /// its deadline passed.
    pub(super) fn look(&mut self, now_ns: u64) -> Vec<Freed> {
        let mut freed = Vec::new();
        self.next_deadline_ns = u64::MAX;
        self.any_stalled.set(false);
        for index in 0..self.running.len() {
            let Some(running) = &self.running[index] else {
                continue;
            };
            let slot = Slot(index);
            if running.token_channel.is_closed() {
                freed.extend(self.vacate(slot).map(|(_, freed)| freed));
            } else if now_ns >= running.deadline_ns {
                freed.extend(self.fail(slot, Failure::DeadlineExceeded));
            } else if running.has_stalled_for(self.slow_reader_ns, now_ns) {
                freed.extend(self.fail(slot, Failure::SlowReader));
            } else {
                self.next_deadline_ns = self.next_deadline_ns.min(running.deadline_ns);
                self.any_stalled
                    .set(self.any_stalled.get() || running.stalled_ns.get() > 0);
            }
        }
        freed
    }

    /// Ends everything with the same failure.
    pub(super) fn fail_all(&mut self, failure: &Failure) -> Vec<Freed> {
        (0..self.running.len())
            .filter_map(|at| self.fail(Slot(at), failure.clone()))
            .collect()
    }

    fn vacate(&mut self, slot: Slot) -> Option<(Running, Freed)> {
        let running = self.running.get_mut(slot.0)?.take()?;
        self.free.push(slot);
        self.cleared += usize::from(running.is_suspect);
        let max_tokens = running.max_tokens;
        Some((running, Freed { slot, max_tokens }))
    }
}

impl Running {
    /// Whether the token_channel has been full for at least `limit_ns`; forgets a stall that is over.
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
        let Some(Some(running)) = self.running.get(slot.0) else {
            return 0;
        };
        let credit = running.token_channel.credit();
        if credit == 0 && running.stalled_ns.get() == 0 {
            running.stalled_ns.set(monotonic_ns());
            self.any_stalled.set(true);
        } else if credit > 0 {
            running.stalled_ns.set(0);
        }
        credit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::TokenBytes;
    use crate::worker::token_channel::TokenReceiver;

    const PATIENCE_NS: u64 = 1_000_000_000;
    const NO_DEADLINE: u64 = u64::MAX;
    /// Long after every patience, and before no deadline.
    const FAR: u64 = u64::MAX - 1;

    fn token() -> Token {
        Token {
            id: 0,
            bytes: TokenBytes::new(),
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        }
    }

    /// One slot, taken by a sequence that has no credit for a second token.
    fn full() -> (Slots, TokenReceiver) {
        let mut slots = Slots::new(1, PATIENCE_NS);
        let (assignment, receiver) = Assignment::for_test(100, Instant::now());
        slots.occupy(Slot(0), assignment, NO_DEADLINE);
        assert!(slots.token(Slot(0), token()).is_none());
        assert_eq!(slots.credit(Slot(0)), 0);
        (slots, receiver)
    }

    async fn read(token_channel: &mut TokenReceiver) {
        let mut outputs = Vec::new();
        std::future::poll_fn(|cx| token_channel.poll_recv_many(cx, &mut outputs, 16)).await;
    }

    #[test]
    fn a_reader_that_stops_reading_is_dropped_after_the_slow_reader_timeout() {
        let (mut slots, _reader) = full();
        let due = slots.next_look_ns();
        assert!(slots.look(due - 1).is_empty());
        assert_eq!(slots.next_look_ns(), due);
        assert_eq!(slots.look(due).len(), 1);
    }

    #[tokio::test]
    async fn a_reader_that_makes_progress_gets_the_full_timeout_again() {
        let (mut slots, mut reader) = full();
        read(&mut reader).await;
        assert!(slots.look(FAR).is_empty());
        assert!(!slots.look_due(FAR), "nobody stands still any more");
    }
}
