//! A run as JSON: everything that was measured, so that others can judge it again.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::machine::Machine;
use super::report::Report;
use super::results::Round;
use super::targets::Target;
use crate::load::Times;

/// The form of the file; another number is another form.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Run<'a> {
    format: u32,
    machine: &'a Machine,
    targets: &'a [Target],
    faults: &'a [String],
    cells: Vec<CellObject<'a>>,
}

/// One lane under one load.
#[derive(Serialize)]
struct CellObject<'a> {
    load: String,
    lane: String,
    floor: Option<String>,
    rounds: &'a [Round],
    /// All rounds together: for each time, in nanoseconds, how often it occurred.
    histograms: Histograms,
}

/// For each time, in nanoseconds, how often it occurred.
#[derive(Serialize)]
pub(crate) struct Histograms {
    one_way: Vec<(u64, u64)>,
    schedule_lateness: Vec<(u64, u64)>,
    runner_lateness: Vec<(u64, u64)>,
    sender_lateness: Vec<(u64, u64)>,
    ttft: Vec<(u64, u64)>,
    inter_token: Vec<(u64, u64)>,
    time_per_output_token: Vec<(u64, u64)>,
}

/// Writes the run to a file.
pub(super) fn write(path: &Path, report: &Report) -> io::Result<()> {
    let cells = report
        .results
        .cells()
        .map(|(scenario, lane, cell)| CellObject {
            load: scenario.title(),
            lane: lane.name(),
            floor: lane.floor().map(super::lane::Lane::name),
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
    write_to(path, &run)
}

impl Histograms {
    /// All values of these times.
    pub(crate) fn of(times: &Times) -> Self {
        let pairs = |histogram: &Histogram<u64>| {
            let recorded = histogram.iter_recorded();
            recorded
                .map(|value| (value.value_iterated_to(), value.count_at_value()))
                .collect()
        };
        Self {
            one_way: pairs(&times.one_way),
            schedule_lateness: pairs(&times.lateness),
            runner_lateness: pairs(&times.runner),
            sender_lateness: pairs(&times.sender),
            ttft: pairs(&times.ttft),
            inter_token: pairs(&times.gaps),
            time_per_output_token: pairs(&times.tpot),
        }
    }
}

/// Writes an object to a file.
pub(crate) fn write_to(path: &Path, object: &impl Serialize) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    serde_json::to_writer(&mut file, object)?;
    file.write_all(b"\n")?;
    file.flush()
}
