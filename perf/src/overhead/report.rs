//! The result of a run, which the tables, the HTML page and the JSON file show.

use serde::{Serialize, Serializer};
use serde_json::json;

use super::path::MeasuredPath;
use super::results::Results;
use super::targets;
use crate::report::Machine;
use crate::target::TargetResult;

const JSON_FORMAT_VERSION: u32 = 1;

/// Result of a run, as the JSON file contains it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    format: u32,
    pub(super) machine: Machine,
    #[serde(rename = "cells", serialize_with = "cells")]
    pub(super) results: Results,
    /// Targets whose values the run has measured.
    pub(super) targets: Vec<TargetResult>,
    /// Faults of streams, and paths that cannot be compared.
    pub(super) faults: Vec<String>,
}

impl Report {
    pub(super) fn new(machine: Machine, results: Results, mut faults: Vec<String>) -> Self {
        faults.extend(results.find_unlike_floors());
        Self {
            format: JSON_FORMAT_VERSION,
            machine,
            targets: targets::judge_targets(&results),
            results,
            faults,
        }
    }
}

fn cells<S: Serializer>(results: &Results, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(results.cells().map(|(key, cell)| {
        json!({
            "load": key.scenario.title(),
            "path": key.path.name(),
            "floor": key.path.floor().map(MeasuredPath::name),
            "rounds": cell.rounds,
            "histograms": cell.times,
        })
    }))
}
