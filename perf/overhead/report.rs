//! What a run came to, for all forms in which it is told.

use super::machine::Machine;
use super::results::Results;
use super::targets::{self, Target};

/// What a run came to.
#[derive(Debug)]
pub(super) struct Report {
    /// Where and when it was made.
    pub(super) machine: Machine,
    pub(super) results: Results,
    /// Those of the targets that the run can judge.
    pub(super) targets: Vec<Target>,
    /// What went wrong with a stream, and what must not be compared.
    pub(super) faults: Vec<String>,
}

impl Report {
    pub(super) fn of(machine: Machine, results: Results, mut faults: Vec<String>) -> Self {
        faults.extend(results.unlike_floors());
        Self {
            machine,
            targets: targets::judge(&results),
            results,
            faults,
        }
    }

    /// Whether a target was not reached.
    pub(super) fn has_missed(&self) -> bool {
        self.targets.iter().any(|target| !target.pass)
    }
}
