//! Counts how often each behavior started, how it ended, and the faults.

use std::collections::BTreeMap;

use serde::Serialize;

use super::behavior::{Behavior, Load};
use crate::fault::Fault;

/// Number of faults that are listed. Further faults are only counted.
const LISTED_FAULTS: usize = 20;

/// Counts of a run.
#[derive(Debug, Serialize)]
pub(super) struct Tally {
    pub(super) kinds: Vec<BehaviorCounts>,
    pub(super) fault_count: u64,
    /// The first [`LISTED_FAULTS`] faults.
    pub(super) faults: Vec<String>,
    /// Number of complete streams that were read to their end.
    #[serde(skip)]
    pub(super) streams: u64,
}

/// Counts of one behavior.
#[derive(Debug, Serialize)]
pub(super) struct BehaviorCounts {
    pub(super) kind: Behavior,
    pub(super) started: u64,
    pub(super) ends: BTreeMap<End, u64>,
}

/// Description of the way in which a behavior ended without a fault.
pub(super) type End = &'static str;

/// Description of a behavior that has not ended, or whose client was stopped.
const UNFINISHED: End = "unfinished";

impl Tally {
    /// Creates a tally of the behaviors of a load.
    pub(super) fn new(load: Load) -> Self {
        let kinds = Behavior::of_load(load)
            .into_iter()
            .map(|kind| BehaviorCounts {
                kind,
                started: 0,
                ends: BTreeMap::new(),
            });
        Self {
            kinds: kinds.collect(),
            fault_count: 0,
            faults: Vec::new(),
            streams: 0,
        }
    }

    pub(super) fn record_start(&mut self, behavior: Behavior) {
        let kind = self.counts_of(behavior);
        kind.started += 1;
        *kind.ends.entry(UNFINISHED).or_default() += 1;
    }

    pub(super) fn record_end(&mut self, behavior: Behavior, ended: Result<End, Fault>) {
        let end = ended.unwrap_or_else(|fault| {
            self.record_fault(format!("{}: {fault}", behavior.name()));
            "fault"
        });
        let ends = &mut self.counts_of(behavior).ends;
        *ends.entry(end).or_default() += 1;
        *ends.entry(UNFINISHED).or_default() -= 1;
        ends.retain(|_, count| *count > 0);
    }

    pub(super) fn record_fault(&mut self, fault: String) {
        self.fault_count += 1;
        if self.faults.len() < LISTED_FAULTS {
            self.faults.push(fault);
        }
    }

    fn counts_of(&mut self, behavior: Behavior) -> &mut BehaviorCounts {
        let mut kinds = self.kinds.iter_mut();
        let kind = kinds.find(|kind| kind.kind == behavior);
        kind.expect("every behavior is counted")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_has_an_end_or_is_unfinished() {
        let mut tally = Tally::new(Load::Mixed);
        for ended in [Some(Ok("whole")), Some(Err(Fault::TimedOut(1))), None] {
            tally.record_start(Behavior::Unary);
            if let Some(ended) = ended {
                tally.record_end(Behavior::Unary, ended);
            }
        }
        let ends = BTreeMap::from([("fault", 1), ("whole", 1), ("unfinished", 1)]);
        assert_eq!(tally.counts_of(Behavior::Unary).ends, ends);
        assert_eq!((tally.fault_count, tally.faults.len()), (1, 1));
    }
}
