//! Counts of each behavior, of its ends, and of faults.

use std::collections::BTreeMap;

use super::behavior::Behavior;
use crate::fault::Fault;

/// Faults that are listed; the others are only counted.
const LISTED_FAULTS: usize = 20;

/// Counts of a run.
#[derive(Debug, Default)]
pub(super) struct Tally {
    started: BTreeMap<Behavior, u64>,
    ends: BTreeMap<(Behavior, End), u64>,
    fault_count: u64,
    streams: u64,
    listed: Vec<String>,
}

/// End of a behavior that is not a fault.
pub(super) type End = &'static str;

impl Tally {
    pub(super) fn start(&mut self, behavior: Behavior) {
        *self.started.entry(behavior).or_default() += 1;
    }

    pub(super) fn end(&mut self, behavior: Behavior, ended: Result<End, Fault>) {
        let end = ended.unwrap_or_else(|fault| {
            self.fault(format!("{}: {fault}", behavior.title()));
            "fault"
        });
        *self.ends.entry((behavior, end)).or_default() += 1;
    }

    pub(super) fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        if self.listed.len() < LISTED_FAULTS {
            self.listed.push(fault);
        }
    }

    /// Counts a stream that was read to its end with every token in its place.
    pub(super) fn whole_stream(&mut self) {
        self.streams += 1;
    }

    pub(super) fn streams(&self) -> u64 {
        self.streams
    }

    pub(super) fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// First faults.
    pub(super) fn listed(&self) -> &[String] {
        &self.listed
    }

    pub(super) fn started(&self, behavior: Behavior) -> u64 {
        self.started.get(&behavior).copied().unwrap_or(0)
    }

    /// Counts of a behavior's ends. The last is `unfinished`, for clients that had to leave.
    pub(super) fn ends(&self, behavior: Behavior) -> Vec<(End, u64)> {
        let of_behavior = self.ends.iter().filter(|((of, _), _)| *of == behavior);
        let mut ends: Vec<_> = of_behavior
            .map(|((_, end), count)| (*end, *count))
            .collect();
        let ended: u64 = ends.iter().map(|(_, count)| count).sum();
        let unfinished = self.started(behavior).saturating_sub(ended);
        if unfinished > 0 {
            ends.push(("unfinished", unfinished));
        }
        ends
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
        let ends = [("fault", 1), ("whole", 1), ("unfinished", 1)];
        assert_eq!(tally.ends(Behavior::Unary), ends);
        assert_eq!((tally.fault_count(), tally.listed().len()), (1, 1));
        assert!(tally.ends(Behavior::Garbage).is_empty());
    }
}
