//! A run on a terminal: one table for each load, and the targets.

use std::io::{self, Write};

use super::report::Report;
use super::results::{Cell, Results, Round};
use super::scale::Scale;
use super::scenario::Scenario;
use super::targets::Target;

/// Writes the tables, the targets, and what went wrong.
pub(super) fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}", text(&report.results))?;
    write_targets(&report.targets, out)?;
    for fault in &report.faults {
        writeln!(out, "FAULT {fault}")?;
    }
    Ok(())
}

/// The tables of all loads.
pub(super) fn text(results: &Results) -> String {
    let (mut lines, mut last) = (Vec::new(), None);
    for (scenario, lane, cell) in results.cells() {
        if last != Some(scenario) {
            lines.extend([String::new(), scenario.title(), head(scenario)]);
            last = Some(scenario);
        }
        lines.push(format!("  {:<30}{}", lane.title(), row(scenario, cell)));
    }
    lines.join("\n")
}

/// Writes the targets, one on each line.
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

fn head(scenario: Scenario) -> String {
    let columns: &[&str] = match scenario {
        Scenario::Full(_) => &[
            "tokens/s",
            "CPU µs/token",
            "tokens/read",
            "bytes/token",
            "load CPU %",
        ],
        Scenario::Paced(_) => &["p50 µs", "p99 µs", "p99.9 µs", "CPU µs/token"],
        Scenario::Short => &["requests/s", "CPU µs/token"],
        Scenario::OpenLoop => &[
            "TTFT p50 µs",
            "TTFT p99 µs",
            "sent late p50",
            "CPU µs/token",
        ],
        Scenario::Scale(Scale::Queued(_)) => &["KiB/request", "load CPU %"],
        Scenario::Scale(_) => &[
            "p50 µs",
            "p99 µs",
            "CPU µs/token",
            "KiB/stream",
            "load CPU %",
        ],
    };
    let columns: String = columns.iter().map(|name| format!("{name:>15}")).collect();
    format!("  {:<30}{columns}", "lane")
}

fn row(scenario: Scenario, cell: &Cell) -> String {
    let median = |value: fn(&Round) -> Option<f64>| cell.spread(value).map(|spread| spread.median);
    let cpu = median(|round| round.cpu_us_per_token);
    let load = || number(median(|round| Some(round.load_share * 100.0)), 0);
    let memory = || number(median(|round| Some(round.rss_per_stream? / 1024.0)), 1);
    match scenario {
        Scenario::Full(_) => [
            number(median(|round| Some(round.tokens_per_second)), 0),
            number(cpu, 2),
            number(median(|round| Some(round.tokens_per_read)), 1),
            number(median(|round| Some(round.bytes_per_token)), 0),
            load(),
        ]
        .concat(),
        Scenario::Paced(_) => {
            let worst = cell.times.one_way.value_at_quantile(0.999);
            [
                number(median(|round| Some(round.one_way_p50_us)), 1),
                number(median(|round| Some(round.one_way_p99_us)), 1),
                number(Some(super::statistics::count(worst) / 1e3), 1),
                number(cpu, 1),
            ]
            .concat()
        }
        Scenario::Short => [
            number(median(|round| Some(round.requests_per_second)), 0),
            number(cpu, 2),
        ]
        .concat(),
        Scenario::OpenLoop => [
            number(median(|round| Some(round.ttft_p50_us)), 1),
            number(median(|round| Some(round.ttft_p99_us)), 1),
            number(median(|round| Some(round.sender_p50_us)), 1),
            number(cpu, 2),
        ]
        .concat(),
        Scenario::Scale(Scale::Queued(_)) => [memory(), load()].concat(),
        Scenario::Scale(_) => [
            number(median(|round| Some(round.one_way_p50_us)), 1),
            number(median(|round| Some(round.one_way_p99_us)), 1),
            number(cpu, 1),
            memory(),
            load(),
        ]
        .concat(),
    }
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(
        || format!("{:>15}", "–"),
        |value| format!("{value:>15.decimals$}"),
    )
}
