//! A run as JSON: every sample of the server, and the counts of its clients.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::behavior::Behavior;
use super::outcome::SoakOutcome;
use super::sample::Sample;
use crate::report::write_json;

/// Version of the file's format.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Run<'a> {
    format: u32,
    seed: u64,
    leaks: Vec<String>,
    fault_count: u64,
    /// First faults.
    faults: &'a [String],
    kinds: Vec<BehaviorObject>,
    before: &'a Sample,
    steady: &'a [Sample],
    after: &'a Sample,
}

#[derive(Serialize)]
struct BehaviorObject {
    #[serde(rename = "kind")]
    behavior: Behavior,
    #[serde(rename = "begun")]
    started: u64,
    ends: BTreeMap<&'static str, u64>,
}

/// Writes the run to a file.
pub(super) fn write(path: &Path, outcome: &SoakOutcome) -> io::Result<()> {
    let tally = &outcome.tally;
    let kinds = Behavior::all().iter().map(|&behavior| BehaviorObject {
        behavior,
        started: tally.started(behavior),
        ends: tally.ends(behavior).into_iter().collect(),
    });
    let run = Run {
        format: FORMAT,
        seed: outcome.seed,
        leaks: outcome.leaks.iter().map(ToString::to_string).collect(),
        fault_count: tally.fault_count(),
        faults: tally.listed(),
        kinds: kinds.collect(),
        before: &outcome.before,
        steady: &outcome.steady,
        after: &outcome.after,
    };
    write_json(path, &run)
}
