//! A run as JSON.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::path::MeasuredPath;
use super::report::Report;
use super::results::Round;
use super::targets::Target;
use crate::report::{Histograms, Machine, write_json};

/// Version of the file's format.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Run<'a> {
    format: u32,
    machine: &'a Machine,
    targets: &'a [Target],
    faults: &'a [String],
    cells: Vec<CellObject<'a>>,
}

/// One path under one load.
#[derive(Serialize)]
struct CellObject<'a> {
    load: String,
    #[serde(rename = "lane")]
    path: String,
    floor: Option<String>,
    rounds: &'a [Round],
    /// Times of all rounds.
    histograms: Histograms,
}

/// Writes the run to a file.
pub(super) fn write(path: &Path, report: &Report) -> io::Result<()> {
    let cells = report.results.cells().map(|(key, cell)| CellObject {
        load: key.scenario.title(),
        path: key.path.name(),
        floor: key.path.floor().map(MeasuredPath::name),
        rounds: &cell.rounds,
        histograms: Histograms::of(&cell.times),
    });
    let run = Run {
        format: FORMAT,
        machine: &report.machine,
        targets: &report.targets,
        faults: &report.faults,
        cells: cells.collect(),
    };
    write_json(path, &run)
}
