//! How often each kind of client ran, how it ended, and what was wrong.

use std::collections::BTreeMap;

use super::Fault;
use super::kind::Kind;

/// How many faults are told; the others are only counted.
const TOLD_FAULTS: usize = 20;

/// The counts of a run.
#[derive(Debug, Default)]
pub(super) struct Tally {
    begun: BTreeMap<Kind, u64>,
    ends: BTreeMap<(Kind, &'static str), u64>,
    fault_count: u64,
    streams: u64,
    told: Vec<String>,
}

/// How a client's deed ended that is no fault.
pub(super) type End = &'static str;

impl Tally {
    pub(super) fn begin(&mut self, kind: Kind) {
        *self.begun.entry(kind).or_default() += 1;
    }

    pub(super) fn end(&mut self, kind: Kind, ended: Result<End, Fault>) {
        let end = match ended {
            Ok(end) => end,
            Err(fault) => {
                self.fault(format!("{}: {fault}", kind.title()));
                "fault"
            }
        };
        *self.ends.entry((kind, end)).or_default() += 1;
    }

    /// Counts a fault that may be no client's.
    pub(super) fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        if self.told.len() < TOLD_FAULTS {
            self.told.push(fault);
        }
    }

    /// Counts streams that were read to their end, every token in its place.
    pub(super) fn whole_streams(&mut self, count: u64) {
        self.streams += count;
    }

    pub(super) fn streams(&self) -> u64 {
        self.streams
    }

    pub(super) fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// The first of the faults.
    pub(super) fn told(&self) -> &[String] {
        &self.told
    }

    /// How often a kind was begun.
    pub(super) fn begun(&self, kind: Kind) -> u64 {
        self.begun.get(&kind).copied().unwrap_or(0)
    }

    /// How often a kind ended in which way; what had not ended when its client had to leave is the last.
    pub(super) fn ends(&self, kind: Kind) -> Vec<(End, u64)> {
        let of_kind = self.ends.iter().filter(|((of, _), _)| *of == kind);
        let mut ends: Vec<_> = of_kind.map(|((_, end), count)| (*end, *count)).collect();
        let ended: u64 = ends.iter().map(|(_, count)| count).sum();
        let unfinished = self.begun(kind).saturating_sub(ended);
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
    fn what_was_begun_is_told_by_its_end_or_as_unfinished() {
        let mut tally = Tally::default();
        for ended in [Some(Ok("whole")), Some(Err(Fault::Hangs)), None] {
            tally.begin(Kind::Unary);
            if let Some(ended) = ended {
                tally.end(Kind::Unary, ended);
            }
        }
        let ends = [("fault", 1), ("whole", 1), ("unfinished", 1)];
        assert_eq!(tally.ends(Kind::Unary), ends);
        assert_eq!((tally.fault_count(), tally.told().len()), (1, 1));
        assert!(tally.ends(Kind::Garbage).is_empty());
    }
}
