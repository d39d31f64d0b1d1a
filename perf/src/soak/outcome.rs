//! The outcome of a soak run.

use serde::Serialize;

use super::sample::Sample;
use super::tally::Tally;
use super::verdict::{format_mib, rss_medians};

pub(super) const JSON_FORMAT_VERSION: u32 = 1;

/// Outcome of a run, as the JSON file contains it.
#[derive(Serialize)]
pub(super) struct SoakOutcome {
    pub(super) format: u32,
    /// Seed with which the run can be repeated.
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) tally: Tally,
    /// Sample between the warm-up and the load.
    pub(super) before: Sample,
    /// Samples under load.
    pub(super) steady: Vec<Sample>,
    /// Sample after all clients had left.
    pub(super) after: Sample,
    pub(super) leaks: Vec<String>,
}

impl SoakOutcome {
    /// Returns true if nothing leaked and every answer was right.
    pub(super) fn has_passed(&self) -> bool {
        self.leaks.is_empty() && self.tally.fault_count == 0
    }

    /// Returns one line for each leak (or one line that there is none), and one for each listed fault.
    pub(super) fn verdict_lines(&self) -> Vec<String> {
        let leaks = self.leaks.iter();
        let mut lines: Vec<_> = leaks.map(|leak| format!("LEAK {leak}")).collect();
        if lines.is_empty() {
            lines.push(format!("no leak: {}", self.memory_summary()));
        }
        let faults = self.tally.faults.iter();
        lines.extend(faults.map(|fault| format!("FAULT {fault}")));
        match self.tally.fault_count {
            0 => {}
            count => lines.push(format!(
                "{count} faults in total; the first are listed above"
            )),
        }
        lines
    }

    fn memory_summary(&self) -> String {
        let Some(median) = rss_medians(&self.steady) else {
            return "the run was too short to judge memory".to_owned();
        };
        let (first, last) = (
            format_mib(median.first_quarter),
            format_mib(median.last_quarter),
        );
        format!("memory was {first} MiB at the beginning of the load and {last} MiB at its end")
    }
}
