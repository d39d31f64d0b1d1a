//! The waiting requests of one caller, in the order in which they get slots.

use std::collections::{BTreeMap, VecDeque};

use super::QueuedChoice;

/// Sort key of waiting requests: lower priority numbers first, then earlier arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct QueueOrder {
    pub(super) priority: i32,
    pub(super) arrival: u64,
}

/// A request that has choices without a slot.
pub(super) struct WaitingRequest<J> {
    pub(super) choices: VecDeque<J>,
    /// True once one of the request's choices has had a slot. The request then no longer counts as queued.
    pub(super) has_started: bool,
    /// Priority among the requests of all callers.
    pub(super) priority_across_callers: i32,
}

/// The waiting requests of one caller.
pub(super) struct CallerQueue<J> {
    waiting: BTreeMap<QueueOrder, WaitingRequest<J>>,
    /// Number of requests that wait for their first slot.
    queued: usize,
    /// Number of choices in all waiting requests.
    choices: usize,
}

impl<J> Default for CallerQueue<J> {
    fn default() -> Self {
        Self {
            waiting: BTreeMap::new(),
            queued: 0,
            choices: 0,
        }
    }
}

impl<J: QueuedChoice> CallerQueue<J> {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns the number of requests that wait for their first slot.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Returns the number of waiting choices.
    pub(super) fn choices(&self) -> usize {
        self.choices
    }

    /// Returns the number of choices that get slots before a new request with this priority.
    pub(super) fn choices_before(&self, priority: i32) -> usize {
        let arrival = u64::MAX;
        let before = self.waiting.range(..=QueueOrder { priority, arrival });
        before.map(|(_, request)| request.choices.len()).sum()
    }

    /// Adds a request that has no slot yet.
    pub(super) fn push(&mut self, order: QueueOrder, request: WaitingRequest<J>) {
        self.queued += 1;
        self.choices += request.choices.len();
        self.waiting.insert(order, request);
    }

    /// Returns the request that gets the next slot.
    pub(super) fn first(&self) -> Option<&WaitingRequest<J>> {
        self.waiting.values().next()
    }

    /// Returns the choice that gets the next slot.
    pub(super) fn first_choice(&self) -> Option<&J> {
        self.first()?.choices.front()
    }

    /// Takes the choice that gets the next slot. Its request then no longer counts as queued.
    pub(super) fn take_first(&mut self) -> Option<J> {
        let mut entry = self.waiting.first_entry()?;
        let request = entry.get_mut();
        let choice = request.choices.pop_front();
        if !std::mem::replace(&mut request.has_started, true) {
            self.queued -= 1;
        }
        self.choices -= usize::from(choice.is_some());
        if request.choices.is_empty() {
            entry.remove();
        }
        choice
    }

    /// Removes the last of the requests that wait for their first slot.
    pub(super) fn remove_last_queued(&mut self) -> Vec<J> {
        let mut queued = self.waiting.iter().rev();
        let last = queued.find(|(_, request)| !request.has_started);
        last.map(|(order, _)| *order)
            .map_or_else(Vec::new, |order| self.remove(order))
    }

    /// Removes a request, and returns its waiting choices.
    pub(super) fn remove(&mut self, order: QueueOrder) -> Vec<J> {
        let Some(request) = self.waiting.remove(&order) else {
            return Vec::new();
        };
        self.queued -= usize::from(!request.has_started);
        self.choices -= request.choices.len();
        request.choices.into()
    }

    /// Drops the choices at the front whose readers were dropped.
    pub(super) fn drop_abandoned_first(&mut self) {
        while let Some(mut entry) = self.waiting.first_entry() {
            let request = entry.get_mut();
            match request.choices.front() {
                Some(choice) if choice.has_reader() => return,
                Some(_) => {
                    request.choices.pop_front();
                    self.choices -= 1;
                }
                None => {
                    self.queued -= usize::from(!request.has_started);
                    entry.remove();
                }
            }
        }
    }

    /// Drops all choices whose readers were dropped.
    pub(super) fn drop_abandoned(&mut self) {
        self.waiting.retain(|_, request| {
            request.choices.retain(QueuedChoice::has_reader);
            !request.choices.is_empty()
        });
        let requests = self.waiting.values();
        self.queued = requests.clone().filter(|it| !it.has_started).count();
        self.choices = requests.map(|it| it.choices.len()).sum();
    }

    /// Removes and returns all waiting choices.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = J> + use<J> {
        (self.queued, self.choices) = (0, 0);
        let waiting = std::mem::take(&mut self.waiting).into_values();
        waiting.flat_map(|request| request.choices)
    }
}
