//! The result of a run, in the form that the table, the page and the JSON file share.

use serde::{Serialize, Serializer};
use serde_json::json;

use super::path::MeasuredPath;
use super::results::Results;
use super::targets::{self, Target};
use crate::report::Machine;

/// Version of the JSON file's format.
const FORMAT: u32 = 1;

/// Result of a run, as it is in the JSON file.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    format: u32,
    pub(super) machine: Machine,
    #[serde(rename = "cells", serialize_with = "cells")]
    pub(super) results: Results,
    /// Targets that the run can judge.
    pub(super) targets: Vec<Target>,
    /// Faults of streams, and paths that cannot be compared.
    pub(super) faults: Vec<String>,
}

impl Report {
    pub(super) fn of(machine: Machine, results: Results, mut faults: Vec<String>) -> Self {
        faults.extend(results.unlike_floors());
        Self {
            format: FORMAT,
            machine,
            targets: targets::judge(&results),
            results,
            faults,
        }
    }

    /// Reports if a target was missed.
    pub(super) fn has_missed(&self) -> bool {
        self.targets.iter().any(|target| !target.pass)
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
