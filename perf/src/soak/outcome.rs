//! Outcome of a run.

use serde_json::{Map, Value, json};

use super::behavior::Behavior;
use super::sample::Sample;
use super::tally::Tally;
use super::verdict::{Leak, mib, rss_medians};

/// Version of the JSON file's format.
const FORMAT: u32 = 1;

/// Outcome of a run.
pub(super) struct SoakOutcome {
    /// Seed that repeats the run.
    pub(super) seed: u64,
    pub(super) tally: Tally,
    /// Between the warm-up and the load.
    pub(super) before: Sample,
    /// Under load.
    pub(super) steady: Vec<Sample>,
    /// After all clients had left.
    pub(super) after: Sample,
    pub(super) leaks: Vec<Leak>,
}

impl SoakOutcome {
    /// Reports if nothing leaked and every answer was right.
    pub(super) fn is_good(&self) -> bool {
        self.leaks.is_empty() && self.tally.fault_count() == 0
    }

    /// One line for each leak, or for none, and for each of the first faults.
    pub(super) fn verdict(&self) -> Vec<String> {
        let leaks = self.leaks.iter();
        let mut lines: Vec<_> = leaks.map(|leak| format!("LEAK {leak}")).collect();
        if lines.is_empty() {
            lines.push(format!("no leak: {}", self.memory()));
        }
        let faults = self.tally.listed().iter();
        lines.extend(faults.map(|fault| format!("FAULT {fault}")));
        match self.tally.fault_count() {
            0 => {}
            count => lines.push(format!("{count} faults, the first of them above")),
        }
        lines
    }

    /// Every sample of the server, and the counts of its clients, for the JSON file.
    pub(super) fn json(&self) -> Value {
        let leaks = self.leaks.iter().map(ToString::to_string);
        let kinds = Behavior::all().iter().map(|&behavior| {
            let ends = self.tally.ends(behavior).into_iter();
            let ends = ends.map(|(end, count)| (end.to_owned(), count.into()));
            json!({
                "kind": behavior,
                "begun": self.tally.started(behavior),
                "ends": ends.collect::<Map<_, _>>(),
            })
        });
        json!({
            "format": FORMAT,
            "seed": self.seed,
            "leaks": leaks.collect::<Vec<_>>(),
            "fault_count": self.tally.fault_count(),
            "faults": self.tally.listed(),
            "kinds": kinds.collect::<Vec<_>>(),
            "before": self.before,
            "steady": self.steady,
            "after": self.after,
        })
    }

    fn memory(&self) -> String {
        let Some(median) = rss_medians(&self.steady) else {
            return "the run was too short to judge memory".to_owned();
        };
        let (first, last) = (mib(median.first_quarter), mib(median.last_quarter));
        format!("memory was {first} MiB at the beginning of the load and {last} MiB at its end")
    }
}
