//! Counts of each behavior, of its ends, and of faults.

use std::collections::BTreeMap;

use serde::Serialize;

use super::behavior::Behavior;
use crate::fault::Fault;

/// Faults that are listed; the others are only counted.
const LISTED_FAULTS: usize = 20;

/// Counts of a run.
#[derive(Debug, Serialize)]
pub(super) struct Tally {
    pub(super) kinds: Vec<Kind>,
    pub(super) fault_count: u64,
    /// First faults.
    pub(super) faults: Vec<String>,
    /// Streams that were read to their end with every token in its place.
    #[serde(skip)]
    pub(super) streams: u64,
}

/// Counts of one behavior.
#[derive(Debug, Serialize)]
pub(super) struct Kind {
    pub(super) kind: Behavior,
    pub(super) started: u64,
    pub(super) ends: BTreeMap<End, u64>,
}

/// End of a behavior that is not a fault.
pub(super) type End = &'static str;

/// End of a behavior whose client has not finished, or had to leave.
const UNFINISHED: End = "unfinished";

impl Default for Tally {
    fn default() -> Self {
        let kinds = Behavior::all().iter().map(|&kind| Kind {
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
}

impl Tally {
    pub(super) fn start(&mut self, behavior: Behavior) {
        let kind = self.kind(behavior);
        kind.started += 1;
        *kind.ends.entry(UNFINISHED).or_default() += 1;
    }

    pub(super) fn end(&mut self, behavior: Behavior, ended: Result<End, Fault>) {
        let end = ended.unwrap_or_else(|fault| {
            self.fault(format!("{}: {fault}", behavior.name()));
            "fault"
        });
        let ends = &mut self.kind(behavior).ends;
        *ends.entry(end).or_default() += 1;
        *ends.entry(UNFINISHED).or_default() -= 1;
        ends.retain(|_, count| *count > 0);
    }

    pub(super) fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        if self.faults.len() < LISTED_FAULTS {
            self.faults.push(fault);
        }
    }

    fn kind(&mut self, behavior: Behavior) -> &mut Kind {
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
        let mut tally = Tally::default();
        for ended in [Some(Ok("whole")), Some(Err(Fault::TimedOut(1))), None] {
            tally.start(Behavior::Unary);
            if let Some(ended) = ended {
                tally.end(Behavior::Unary, ended);
            }
        }
        let ends = BTreeMap::from([("fault", 1), ("whole", 1), ("unfinished", 1)]);
        assert_eq!(tally.kind(Behavior::Unary).ends, ends);
        assert_eq!((tally.fault_count, tally.faults.len()), (1, 1));
    }
}
