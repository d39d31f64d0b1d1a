//! What came of a run.

use super::sample::Sample;
use super::tally::Tally;
use super::verdict::{Leak, mib, rss_medians};

/// What came of a run.
pub(super) struct Outcome {
    /// The run can be made again with it.
    pub(super) seed: u64,
    pub(super) tally: Tally,
    /// What the server held between the warm-up and the load.
    pub(super) before: Sample,
    /// What it held under the load.
    pub(super) steady: Vec<Sample>,
    /// What it held when all clients had gone.
    pub(super) after: Sample,
    pub(super) leaks: Vec<Leak>,
}

impl Outcome {
    /// Whether nothing leaked and every answer was right.
    pub(super) fn is_good(&self) -> bool {
        self.leaks.is_empty() && self.tally.fault_count() == 0
    }

    /// One line for each leak and for the first faults, or that there was no leak.
    pub(super) fn verdict(&self) -> Vec<String> {
        let mut lines: Vec<_> = self
            .leaks
            .iter()
            .map(|leak| format!("LEAK {leak}"))
            .collect();
        if lines.is_empty() {
            lines.push(format!("no leak{}", self.memory()));
        }
        let (told, count) = (self.tally.told(), self.tally.fault_count());
        lines.extend(told.iter().map(|fault| format!("FAULT {fault}")));
        if count > 0 {
            lines.push(format!("{count} faults, the first of them above"));
        }
        lines
    }

    fn memory(&self) -> String {
        rss_medians(&self.steady).map_or_else(
            || ": the run was too short to judge memory".to_owned(),
            |(from, to)| {
                let (from, to) = (mib(from), mib(to));
                format!(
                    ": memory was {from} MiB at the beginning of the load and {to} MiB at its end"
                )
            },
        )
    }
}
