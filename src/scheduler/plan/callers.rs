//! The callers of one model: decides which of them gets the next slot, and which of them gives up a place in a full
//! queue.
//!
//! # The next slot
//! The next slot goes to the waiting caller that has the fewest slots for its weight (weighted max-min fairness). So a
//! caller without a slot comes before every caller with a slot, however many requests the others have queued, and no
//! caller exceeds its share while a caller below its own share waits. Shares are whole slots: of two slots, weights 4
//! and 1 get one each.
//!
//! Callers that have equally few slots take turns by start-time fair queuing (Goyal, Vin and Cheng, 1996) over the time
//! for which they have held slots, divided by their weights. With one slot, weights 4 and 1 therefore get four fifths
//! and one fifth of the time. A caller that joins starts at the smallest time of all known callers, so a caller gains
//! nothing by its absence. A caller that has used more than its share owes the difference.
//!
//! # A full queue
//! The caller with the most queued requests for its weight loses its last request (longest-queue drop, as in network
//! switches). If no caller has more than the caller of the new request, the new request is rejected.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::QueuedChoice;
use super::caller_queue::{CallerQueue, QueueOrder, WaitingRequest};
use super::caller_share::CallerShare;
use crate::keys::KeyName;

/// Fixed-point factor of counts that are divided by a weight. Two different quotients of counts by weights up to 100
/// differ by at least 1/10,000.
const PER_WEIGHT: u64 = 1 << 32;

/// Identifies a caller within [`Callers`]. Ids are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CallerId(u64);

/// Sort key of waiting callers. The first one gets the next slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    /// Priority of the caller's first request among the requests of all callers.
    priority: i32,
    slots_per_weight: u64,
    time_per_weight: Duration,
    /// True if the caller has had a slot since it joined. Of otherwise equal callers, those without come first.
    had_slot: bool,
    /// Number of the caller's latest slot, or of its joining. Of otherwise equal callers, the one that has waited
    /// longest comes first.
    since: u64,
}

/// The callers of one model that have waiting or running choices, or have used more than their share.
pub(super) struct Callers<J> {
    by_key: HashMap<Option<KeyName>, CallerId>,
    states: BTreeMap<CallerId, CallerState<J>>,
    /// The waiting callers.
    turns: BTreeSet<(Turn, CallerId)>,
    /// All callers, by the time that they have used. The first caller is never idle: it would owe nothing, so it is
    /// forgotten.
    by_time: BTreeSet<(Duration, CallerId)>,
    /// Number of requests that wait for their first slot.
    queued: usize,
    /// The next number for [`CallerId`] and [`Turn::since`].
    next_number: u64,
}

struct CallerState<J> {
    key: Option<KeyName>,
    weight: u32,
    queue: CallerQueue<J>,
    /// Number of slots that the caller's choices have.
    slots: u32,
    /// Total time for which the caller has held slots that are free again, divided by the weight.
    time_per_weight: Duration,
    had_slot: bool,
    since: u64,
    /// The caller's entry in `turns`.
    turn: Option<Turn>,
}

/// A request that does not fit into the queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Overflow<J> {
    /// The new request.
    New,
    /// The waiting choices of another caller's request.
    Displaced(Vec<J>),
}

impl<J> Default for Callers<J> {
    fn default() -> Self {
        Self {
            by_key: HashMap::new(),
            states: BTreeMap::new(),
            turns: BTreeSet::new(),
            by_time: BTreeSet::new(),
            queued: 0,
            next_number: 0,
        }
    }
}

impl<J: QueuedChoice> Callers<J> {
    /// Returns true if no request waits.
    pub(super) fn has_none_waiting(&self) -> bool {
        self.turns.is_empty()
    }

    /// Returns the number of requests that wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Returns the queue of a caller. `None` if the caller is not known.
    pub(super) fn queue(&self, share: &CallerShare) -> Option<&CallerQueue<J>> {
        let id = self.by_key.get(&share.key)?;
        Some(&self.states.get(id)?.queue)
    }

    /// Finds or adds a caller, and sets its weight. A caller that has neither waiting nor running choices joins.
    pub(super) fn join(&mut self, share: &CallerShare) -> CallerId {
        let floor = self
            .by_time
            .first()
            .map_or(Duration::ZERO, |(time, _)| *time);
        self.next_number += 1;
        let number = self.next_number;
        let id = match self.by_key.get(&share.key) {
            Some(id) => *id,
            None => {
                let id = CallerId(number);
                self.by_key.insert(share.key.clone(), id);
                self.by_time.insert((floor, id));
                let state = CallerState::new(share.key.clone(), floor);
                self.states.insert(id, state);
                id
            }
        };
        let state = self.state(id);
        state.weight = share.weight.get();
        if state.is_idle() {
            // A known idle caller owes time, so its time is not below the floor.
            (state.had_slot, state.since) = (false, number);
        }
        self.update_turn(id);
        id
    }

    /// Adds a waiting request.
    pub(super) fn push(&mut self, id: CallerId, order: QueueOrder, request: WaitingRequest<J>) {
        self.change_queue(id, |queue| queue.push(order, request));
    }

    /// Returns the choice that gets the next slot. Drops those before it whose readers were dropped.
    pub(super) fn first_choice(&mut self) -> Option<&J> {
        let id = loop {
            let (_, id) = *self.turns.first()?;
            let first = self.state(id).queue.first_choice();
            if first.is_some_and(QueuedChoice::has_reader) {
                break id;
            }
            self.change_queue(id, CallerQueue::drop_abandoned_first);
        };
        self.state(id).queue.first_choice()
    }

    /// Takes the choice that gets the next slot, and gives its caller the slot.
    pub(super) fn take_first(&mut self) -> Option<(CallerId, J)> {
        let (_, id) = *self.turns.first()?;
        // The slot is counted first, so that the caller is not idle when its last choice leaves the queue.
        self.add_slot(id);
        let choice = self.change_queue(id, CallerQueue::take_first)?;
        Some((id, choice))
    }

    /// Records that a choice of the caller has got a slot.
    pub(super) fn add_slot(&mut self, id: CallerId) {
        self.next_number += 1;
        let number = self.next_number;
        let state = self.state(id);
        state.slots += 1;
        (state.had_slot, state.since) = (true, number);
        self.update_turn(id);
    }

    /// Records that a slot of the caller is free again, after this time.
    pub(super) fn remove_slot(&mut self, id: CallerId, held: Duration) {
        let state = self.state(id);
        state.slots = state.slots.saturating_sub(1);
        let before = state.time_per_weight;
        let after = before.saturating_add(held / state.weight);
        state.time_per_weight = after;
        self.by_time.remove(&(before, id));
        self.by_time.insert((after, id));
        self.update_turn(id);
        self.forget_idle();
    }

    /// Makes room in a full queue after the request with this order was added for a caller.
    pub(super) fn make_room(&mut self, newest: CallerId, order: QueueOrder) -> Overflow<J> {
        let queued_per_weight = |state: &CallerState<J>| {
            let queued = u64::try_from(state.queue.queued()).unwrap_or(u64::MAX);
            per_weight(queued, state.weight)
        };
        let own = queued_per_weight(self.state(newest));
        let callers = self.states.iter();
        let longest = callers.max_by_key(|(_, state)| queued_per_weight(state));
        let longest = longest.filter(|(_, state)| queued_per_weight(state) > own);
        if let Some((&id, _)) = longest {
            let displaced = self.change_queue(id, CallerQueue::remove_last_queued);
            return Overflow::Displaced(displaced);
        }
        self.change_queue(newest, |queue| queue.remove(order));
        Overflow::New
    }

    /// Drops the waiting choices whose readers were dropped.
    pub(super) fn drop_abandoned(&mut self) {
        let waiting: Vec<_> = self.turns.iter().map(|(_, id)| *id).collect();
        for id in waiting {
            self.change_queue(id, CallerQueue::drop_abandoned);
        }
    }

    /// Removes and returns all waiting choices.
    pub(super) fn clear(&mut self) -> Vec<J> {
        let waiting: Vec<_> = self.turns.iter().map(|(_, id)| *id).collect();
        let cleared = waiting
            .into_iter()
            .flat_map(|id| self.change_queue(id, CallerQueue::clear));
        cleared.collect()
    }

    /// Changes the queue of a caller, and what depends on it.
    fn change_queue<T>(
        &mut self,
        id: CallerId,
        change: impl FnOnce(&mut CallerQueue<J>) -> T,
    ) -> T {
        let queue = &mut self.state(id).queue;
        let before = queue.queued();
        let result = change(queue);
        let after = queue.queued();
        self.queued = self.queued + after - before;
        self.update_turn(id);
        self.forget_idle();
        result
    }

    /// Updates the entry of a caller in `turns`.
    fn update_turn(&mut self, id: CallerId) {
        let state = self
            .states
            .get_mut(&id)
            .expect("a caller that waits or runs is known");
        let turn = state.next_turn();
        let before = std::mem::replace(&mut state.turn, turn);
        if before == turn {
            return;
        }
        if let Some(before) = before {
            self.turns.remove(&(before, id));
        }
        if let Some(turn) = turn {
            self.turns.insert((turn, id));
        }
    }

    /// Forgets the idle callers that owe nothing.
    fn forget_idle(&mut self) {
        while let Some((_, id)) = self.by_time.first() {
            if !self.states.get(id).is_none_or(CallerState::is_idle) {
                return;
            }
            let forgotten = self.states.remove(id);
            self.by_time.pop_first();
            if let Some(state) = forgotten {
                self.by_key.remove(&state.key);
            }
        }
    }

    fn state(&mut self, id: CallerId) -> &mut CallerState<J> {
        let state = self.states.get_mut(&id);
        state.expect("a caller that waits or runs is known")
    }
}

impl<J: QueuedChoice> CallerState<J> {
    fn new(key: Option<KeyName>, time_per_weight: Duration) -> Self {
        Self {
            key,
            weight: 1,
            queue: CallerQueue::default(),
            slots: 0,
            time_per_weight,
            had_slot: false,
            since: 0,
            turn: None,
        }
    }

    fn is_idle(&self) -> bool {
        self.slots == 0 && self.queue.is_empty()
    }

    fn next_turn(&self) -> Option<Turn> {
        let first = self.queue.first()?;
        Some(Turn {
            priority: first.priority_across_callers,
            slots_per_weight: per_weight(self.slots.into(), self.weight),
            time_per_weight: self.time_per_weight,
            had_slot: self.had_slot,
            since: self.since,
        })
    }
}

fn per_weight(count: u64, weight: u32) -> u64 {
    count.saturating_mul(PER_WEIGHT) / u64::from(weight)
}
