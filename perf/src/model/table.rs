//! Prints the results of a run: one table for each scenario, with a row for each figure and a column for each server,
//! and then the targets.

use std::io::{self, Write};

use super::report::Report;
use super::results::{Cell, Results};
use super::scenario::Scenario;
use crate::report::{format_row, format_spread};
use crate::statistics::{Spread, count_to_f64};
use crate::target;

/// Width of each server's column, in characters.
const COLUMN_WIDTH: usize = 26;

pub(super) fn write_report(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    for line in report.settings.describe() {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "{}", render_tables(&report.results))?;
    target::write_targets(&report.targets, out)?;
    for note in &report.notes {
        writeln!(out, "NOTE {note}")?;
    }
    for fault in &report.faults {
        writeln!(out, "FAULT {fault}")?;
    }
    Ok(())
}

pub(super) fn render_tables(results: &Results) -> String {
    let tables = results
        .scenarios()
        .map(|scenario| scenario_table(results, scenario));
    tables.collect::<Vec<_>>().join("\n")
}

fn scenario_table(results: &Results, scenario: Scenario) -> String {
    let cells: Vec<_> = results.of_scenario(scenario).collect();
    let row = |name: &str, text: &dyn Fn(&Cell) -> String| {
        let columns = cells
            .iter()
            .map(|cell| format!("{:>COLUMN_WIDTH$}", text(cell)));
        format_row(name, &columns.collect::<Vec<_>>())
    };
    let head = row("", &|cell| cell.server.title().to_owned());
    let figures = scenario.figures().iter().map(|figure| {
        row(&format!("{}, {}", figure.name(), figure.unit()), &|cell| {
            format_value(cell.spread(*figure))
        })
    });
    let memory = row("memory, MiB", &|cell| format_value(cell.rss_mib()));
    let prompts = row("prompt tokens (reused)", &format_prompt_tokens);
    let lines = [String::new(), scenario.title(), head]
        .into_iter()
        .chain(figures)
        .chain([memory, prompts]);
    lines.collect::<Vec<_>>().join("\n")
}

/// Formats a figure or the memory, with a decimal below 1,000.
fn format_value(spread: Option<Spread>) -> String {
    let is_large = spread.is_some_and(|spread| spread.highest >= 1e3);
    format_spread(spread, usize::from(!is_large))
}

/// Formats the number of prompt tokens of all rounds, and the share of them that the server reused.
fn format_prompt_tokens(cell: &Cell) -> String {
    let counts = cell.counts();
    let tokens = counts.prompt_tokens;
    match counts.cached_tokens {
        Some(cached) if tokens > 0 => {
            let share = 100.0 * count_to_f64(cached) / count_to_f64(tokens);
            format!("{tokens} ({share:.0} %)")
        }
        Some(_) | None => format!("{tokens} (unknown)"),
    }
}
