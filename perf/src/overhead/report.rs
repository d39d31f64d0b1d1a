//! The result of a run, in the form that the table, the page and the JSON file share.

use serde_json::{Value, json};

use super::path::MeasuredPath;
use super::results::Results;
use super::targets::{self, Target};
use crate::report::Machine;

/// Version of the JSON file's format.
const FORMAT: u32 = 1;

/// Result of a run.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) machine: Machine,
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

    /// All measurements, for the JSON file.
    pub(super) fn json(&self) -> Value {
        let cells = self.results.cells().map(|(key, cell)| {
            json!({
                "load": key.scenario.title(),
                "lane": key.path.name(),
                "floor": key.path.floor().map(MeasuredPath::name),
                "rounds": cell.rounds,
                "histograms": cell.times,
            })
        });
        json!({
            "format": FORMAT,
            "machine": self.machine,
            "targets": self.targets,
            "faults": self.faults,
            "cells": cells.collect::<Vec<_>>(),
        })
    }
}
