//! A run as JSON: every look at the server, and what its clients did.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::kind::Kind;
use super::outcome::Outcome;
use super::sample::Sample;
use crate::overhead::json::write_to;

/// The form of the file; another number is another form.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Run<'a> {
    format: u32,
    seed: u64,
    leaks: Vec<String>,
    fault_count: u64,
    /// The first of them.
    faults: &'a [String],
    kinds: Vec<KindObject>,
    before: &'a Sample,
    steady: &'a [Sample],
    after: &'a Sample,
}

#[derive(Serialize)]
struct KindObject {
    kind: Kind,
    begun: u64,
    ends: BTreeMap<&'static str, u64>,
}

/// Writes the run to a file.
pub(super) fn write(path: &Path, outcome: &Outcome) -> io::Result<()> {
    let tally = &outcome.tally;
    let kinds = Kind::ALL.map(|kind| KindObject {
        kind,
        begun: tally.begun(kind),
        ends: tally.ends(kind).into_iter().collect(),
    });
    let run = Run {
        format: FORMAT,
        seed: outcome.seed,
        leaks: outcome.leaks.iter().map(ToString::to_string).collect(),
        fault_count: tally.fault_count(),
        faults: tally.told(),
        kinds: kinds.into(),
        before: &outcome.before,
        steady: &outcome.steady,
        after: &outcome.after,
    };
    write_to(path, &run)
}
