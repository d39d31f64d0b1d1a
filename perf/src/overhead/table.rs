//! Prints a run: one table for each load, and the targets.

use std::io::{self, Write};

use super::report::Report;
use super::results::{Cell, CellKey, Results, Round};
use super::scale::Shape;
use super::scenario::Scenario;
use crate::report::{format_head, format_number, format_row};
use crate::statistics::percentile_us;
use crate::target;

/// A column of a table, with one value for each cell of the results.
struct Column {
    name: &'static str,
    decimals: usize,
    value: Box<CellValue>,
}

type CellValue = dyn Fn(&Cell) -> Option<f64>;

pub(super) fn write_report(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}", render_tables(&report.results))?;
    target::write_targets(&report.targets, out)?;
    for fault in &report.faults {
        writeln!(out, "FAULT {fault}")?;
    }
    Ok(())
}

pub(super) fn render_tables(results: &Results) -> String {
    let (mut lines, mut last) = (Vec::new(), None);
    for (CellKey { scenario, path }, cell) in results.cells() {
        let columns = columns(scenario);
        if last != Some(scenario) {
            let names: Vec<_> = columns.iter().map(|column| column.name).collect();
            lines.extend([String::new(), scenario.title(), format_head("path", &names)]);
            last = Some(scenario);
        }
        let cells = columns
            .iter()
            .map(|column| format_number((column.value)(cell), column.decimals));
        lines.push(format_row(path.title(), &cells.collect::<Vec<_>>()));
    }
    lines.join("\n")
}

fn columns(scenario: Scenario) -> Vec<Column> {
    let cpu = |decimals| median("CPU µs/token", decimals, |round| round.cpu_us_per_token);
    let load_cpu = median("load CPU %", 0, |round| round.load_share * 100.0);
    let p50 = median("p50 µs", 1, |round| round.one_way_p50_us);
    let p99 = median("p99 µs", 1, |round| round.one_way_p99_us);
    let memory = |name| median(name, 1, |round| Some(round.rss_per_stream? / 1024.0));
    match scenario {
        Scenario::Full(_) => vec![
            median("tokens/s", 0, |round| round.rates.tokens_per_second),
            cpu(2),
            median("tokens/read", 1, |round| round.rates.tokens_per_read),
            median("bytes/token", 0, |round| round.rates.bytes_per_token),
            load_cpu,
        ],
        Scenario::Paced(_) => {
            // One round has too few tokens for this percentile, so it is computed from all rounds together.
            let p999 = Column {
                name: "p99.9 µs",
                decimals: 1,
                value: Box::new(|cell| Some(percentile_us(&cell.times.one_way, 99.9))),
            };
            vec![p50, p99, p999, cpu(1)]
        }
        Scenario::Short => vec![
            median("requests/s", 0, |round| round.rates.requests_per_second),
            cpu(2),
        ],
        Scenario::OpenLoop => vec![
            median("TTFT p50 µs", 1, |round| round.ttft_p50_us),
            median("TTFT p99 µs", 1, |round| round.ttft_p99_us),
            median("sent late p50", 1, |round| round.sender_p50_us),
            cpu(2),
        ],
        Scenario::Scale(scale) if scale.shape == Shape::Queued => {
            vec![memory("KiB/request"), load_cpu]
        }
        Scenario::Scale(_) => vec![p50, p99, cpu(1), memory("KiB/stream"), load_cpu],
    }
}

/// Returns a column that shows the median of a value over the rounds.
fn median<V: Into<Option<f64>> + 'static>(
    name: &'static str,
    decimals: usize,
    value: fn(&Round) -> V,
) -> Column {
    let median = move |cell: &Cell| Some(cell.spread(|round| value(round).into())?.median);
    Column {
        name,
        decimals,
        value: Box::new(median),
    }
}
