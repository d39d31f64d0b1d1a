//! A run on a terminal: one table for each load, and the targets.

use std::io::{self, Write};

use super::report::Report;
use super::results::{Cell, CellKey, Results, Round};
use super::scale::Shape;
use super::scenario::Scenario;
use super::targets::Target;
use crate::report::{head, number, row};
use crate::statistics::Percentiles;

/// A column: its name, its number of decimals and its value.
type Column = (&'static str, usize, fn(&Cell) -> Option<f64>);

const CPU: &str = "CPU µs/token";
const LOAD_CPU: Column = ("load CPU %", 0, |cell| {
    median(cell, |round| Some(round.load_share * 100.0))
});
const P50: Column = ("p50 µs", 1, |cell| {
    median(cell, |round| Some(round.one_way_p50_us))
});
const P99: Column = ("p99 µs", 1, |cell| {
    median(cell, |round| Some(round.one_way_p99_us))
});

/// Writes the tables, the targets and the faults.
pub(super) fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}", text(&report.results))?;
    write_targets(&report.targets, out)?;
    for fault in &report.faults {
        writeln!(out, "FAULT {fault}")?;
    }
    Ok(())
}

/// Tables of all loads.
pub(super) fn text(results: &Results) -> String {
    let (mut lines, mut last) = (Vec::new(), None);
    for (CellKey { scenario, path }, cell) in results.cells() {
        let columns = columns(scenario);
        if last != Some(scenario) {
            let names: Vec<_> = columns.iter().map(|(name, ..)| *name).collect();
            lines.extend([String::new(), scenario.title(), head("path", &names)]);
            last = Some(scenario);
        }
        let cells = columns
            .iter()
            .map(|(_, decimals, value)| number(value(cell), *decimals));
        lines.push(row(path.title(), &cells.collect::<Vec<_>>()));
    }
    lines.join("\n")
}

/// Writes the targets, one a line.
fn write_targets(targets: &[Target], out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nTargets (median of the rounds, lowest to highest)")?;
    for target in targets {
        let verdict = if target.pass { "pass" } else { "FAIL" };
        let (spread, unit) = (target.spread, target.unit);
        let bound = target.bound.sign();
        writeln!(
            out,
            "  {verdict}  {:<54}{:>8.2} {unit:<3} ({:.2} to {:.2}), {bound} {:.2}",
            target.target, spread.median, spread.lowest, spread.highest, target.limit
        )?;
    }
    Ok(())
}

fn columns(scenario: Scenario) -> Vec<Column> {
    match scenario {
        Scenario::Full(_) => vec![
            ("tokens/s", 0, |cell| {
                median(cell, |round| Some(round.tokens_per_second))
            }),
            (CPU, 2, cpu),
            ("tokens/read", 1, |cell| {
                median(cell, |round| Some(round.tokens_per_read))
            }),
            ("bytes/token", 0, |cell| {
                median(cell, |round| Some(round.bytes_per_token))
            }),
            LOAD_CPU,
        ],
        Scenario::Paced(_) => vec![
            P50,
            P99,
            ("p99.9 µs", 1, |cell| {
                Some(Percentiles::of(&cell.times.one_way).p999)
            }),
            (CPU, 1, cpu),
        ],
        Scenario::Short => vec![
            ("requests/s", 0, |cell| {
                median(cell, |round| Some(round.requests_per_second))
            }),
            (CPU, 2, cpu),
        ],
        Scenario::OpenLoop => vec![
            ("TTFT p50 µs", 1, |cell| {
                median(cell, |round| Some(round.ttft_p50_us))
            }),
            ("TTFT p99 µs", 1, |cell| {
                median(cell, |round| Some(round.ttft_p99_us))
            }),
            ("sent late p50", 1, |cell| {
                median(cell, |round| Some(round.sender_p50_us))
            }),
            (CPU, 2, cpu),
        ],
        Scenario::Scale(scale) if scale.shape == Shape::Queued => {
            vec![("KiB/request", 1, memory), LOAD_CPU]
        }
        Scenario::Scale(_) => {
            vec![P50, P99, (CPU, 1, cpu), ("KiB/stream", 1, memory), LOAD_CPU]
        }
    }
}

fn median(cell: &Cell, value: fn(&Round) -> Option<f64>) -> Option<f64> {
    cell.spread(value).map(|spread| spread.median)
}

fn cpu(cell: &Cell) -> Option<f64> {
    median(cell, |round| round.cpu_us_per_token)
}

fn memory(cell: &Cell) -> Option<f64> {
    median(cell, |round| Some(round.rss_per_stream? / 1024.0))
}
