//! The queue of one model: the requests and resumed choices that wait for a slot.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::QueuedChoice;
use super::caller_queue::{QueueOrder, WaitingRequest};
use super::caller_share::{CallerShare, PriorityReach};
use super::callers::{CallerId, Callers, Overflow};
use super::wait_estimate::WaitEstimate;

/// A deadline is refused if the estimated wait is more than this many times the time left. The estimate assumes that
/// slots become free as slowly as in the recent past, but the requests ahead may be faster.
const WAIT_MARGIN: u32 = 2;

/// The requests and resumed choices of one model that wait for a slot.
pub(super) struct ModelQueue<J> {
    /// Choices whose workers were lost. They are placed before all new requests.
    resumed: BTreeMap<QueueOrder, (CallerShare, J)>,
    callers: Callers<J>,
    /// Maximum number of requests that wait for their first slot.
    depth: usize,
    estimate: WaitEstimate,
}

/// A place among the resumed choices.
pub(super) type ResumedAt = QueueOrder;

impl<J: QueuedChoice> ModelQueue<J> {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            resumed: BTreeMap::new(),
            callers: Callers::default(),
            depth,
            estimate: WaitEstimate::default(),
        }
    }

    /// Returns the number of requests that wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.callers.queued()
    }

    fn is_empty(&self) -> bool {
        self.resumed.is_empty() && self.callers.has_none_waiting()
    }

    /// Returns the estimated wait of a new request if it is too long for a deadline that is `left` away.
    ///
    /// Only the caller's own choices ahead count, because the requests of other callers do not delay it for long. With
    /// nothing ahead, no deadline is refused.
    pub(super) fn wait_beyond(
        &self,
        caller: &CallerShare,
        priority: i32,
        left: Duration,
    ) -> Option<Duration> {
        let queue = self.callers.queue(caller)?;
        let wait = |choices: usize| self.estimate.wait(choices);
        let is_too_long = |wait: &Duration| *wait > left.saturating_mul(WAIT_MARGIN);
        // Counting the choices ahead is slow, so it is done only if all choices together would take too long.
        wait(queue.choices()).filter(is_too_long)?;
        wait(queue.choices_before(priority)).filter(is_too_long)
    }

    /// Adds a new request.
    pub(super) fn push(
        &mut self,
        caller: &CallerShare,
        order: QueueOrder,
        choices: Vec<J>,
    ) -> CallerId {
        let id = self.callers.join(caller);
        let request = WaitingRequest {
            choices: choices.into(),
            has_started: false,
            priority_across_callers: match caller.priority_reach {
                PriorityReach::OwnRequests => 0,
                PriorityReach::AllRequests => order.priority,
            },
        };
        self.callers.push(id, order, request);
        id
    }

    /// Adds a choice whose worker was lost.
    pub(super) fn push_resumed(&mut self, caller: CallerShare, order: QueueOrder, choice: J) {
        self.resumed.insert(order, (caller, choice));
    }

    /// Removes one request if more requests wait for their first slot than the queue's depth allows. `newest` is the
    /// request that was just added.
    pub(super) fn make_room(&mut self, newest: (CallerId, QueueOrder)) -> Option<Overflow<J>> {
        let is_full = self.queued() > self.depth;
        is_full.then(|| self.callers.make_room(newest.0, newest.1))
    }

    /// Returns the first resumed choice, or the first after `after`. Drops choices whose readers were dropped.
    pub(super) fn next_resumed(&mut self, after: Option<ResumedAt>) -> Option<(ResumedAt, &J)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let at = loop {
            let (at, (_, choice)) = self.resumed.range((from, Bound::Unbounded)).next()?;
            let at = *at;
            if choice.has_reader() {
                break at;
            }
            self.resumed.remove(&at);
        };
        self.resumed.get(&at).map(|(_, choice)| (at, choice))
    }

    /// Takes a resumed choice, and gives its caller a slot.
    pub(super) fn take_resumed(&mut self, at: ResumedAt) -> Option<(CallerId, J)> {
        let (caller, choice) = self.resumed.remove(&at)?;
        let id = self.callers.join(&caller);
        self.callers.add_slot(id);
        Some((id, choice))
    }

    /// Returns the choice of a new request that gets the next slot. Drops those whose readers were dropped.
    pub(super) fn next_new(&mut self) -> Option<&J> {
        self.callers.first_choice()
    }

    /// Takes the choice of a new request that gets the next slot, and gives its caller the slot.
    pub(super) fn take_new(&mut self) -> Option<(CallerId, J)> {
        self.callers.take_first()
    }

    /// Records that a caller's slot is free again, after this time.
    pub(super) fn remove_slot(&mut self, caller: CallerId, held: Duration) {
        self.callers.remove_slot(caller, held);
    }

    /// Records that a slot that became free at `now` was offered to the waiting choices.
    pub(super) fn record_free_slot(&mut self, now: Instant) {
        match self.is_empty() {
            true => self.estimate.reset(),
            false => self.estimate.record_free_slot(now),
        }
    }

    /// Records that the model's slots have changed, or that their sequences were lost.
    pub(super) fn record_changed_slots(&mut self) {
        self.estimate.reset();
    }

    /// Drops the waiting choices whose readers were dropped.
    pub(super) fn drop_abandoned(&mut self) {
        self.resumed.retain(|_, (_, choice)| choice.has_reader());
        self.callers.drop_abandoned();
    }

    /// Removes and returns all waiting choices.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let resumed = std::mem::take(&mut self.resumed).into_values();
        let resumed = resumed.map(|(_, choice)| choice);
        resumed.chain(self.callers.clear()).collect()
    }
}
