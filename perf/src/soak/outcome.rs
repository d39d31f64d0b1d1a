//! Outcome of a run.

use serde::Serialize;

use super::sample::Sample;
use super::tally::Tally;
use super::verdict::{mib, rss_medians};

/// Version of the JSON file's format.
pub(super) const FORMAT: u32 = 1;

/// Outcome of a run, as it is in the JSON file.
#[derive(Serialize)]
pub(super) struct SoakOutcome {
    pub(super) format: u32,
    /// Seed that repeats the run.
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) tally: Tally,
    /// Between the warm-up and the load.
    pub(super) before: Sample,
    /// Under load.
    pub(super) steady: Vec<Sample>,
    /// After all clients had left.
    pub(super) after: Sample,
    pub(super) leaks: Vec<String>,
}

impl SoakOutcome {
    /// Reports if nothing leaked and every answer was right.
    pub(super) fn is_good(&self) -> bool {
        self.leaks.is_empty() && self.tally.fault_count == 0
    }

    /// One line for each leak, or for none, and for each of the first faults.
    pub(super) fn verdict(&self) -> Vec<String> {
        let leaks = self.leaks.iter();
        let mut lines: Vec<_> = leaks.map(|leak| format!("LEAK {leak}")).collect();
        if lines.is_empty() {
            lines.push(format!("no leak: {}", self.memory()));
        }
        let faults = self.tally.faults.iter();
        lines.extend(faults.map(|fault| format!("FAULT {fault}")));
        match self.tally.fault_count {
            0 => {}
            count => lines.push(format!("{count} faults, the first of them above")),
        }
        lines
    }

    fn memory(&self) -> String {
        let Some(median) = rss_medians(&self.steady) else {
            return "the run was too short to judge memory".to_owned();
        };
        let (first, last) = (mib(median.first_quarter), mib(median.last_quarter));
        format!("memory was {first} MiB at the beginning of the load and {last} MiB at its end")
    }
}
