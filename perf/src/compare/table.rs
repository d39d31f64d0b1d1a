//! Prints a comparison as tables: one table for each figure, with one row for each server.

use hdrhistogram::Histogram;

use super::results::{Comparison, ServerResults};
use crate::load_stats::{LatencyHistograms, Rates};
use crate::report::{format_cell, format_head, format_number, format_row};
use crate::statistics::Percentiles;

/// A rate's name, number of decimals and value.
type RateColumn = (&'static str, usize, fn(&Rates) -> f64);

const RATES: [RateColumn; 4] = [
    ("tokens/s", 0, |rates| rates.tokens_per_second),
    ("requests/s", 1, |rates| rates.requests_per_second),
    ("tokens/read", 1, |rates| rates.tokens_per_read),
    ("bytes/token", 0, |rates| rates.bytes_per_token),
];

/// A measured time, with its name and definition.
pub(super) struct TimeFigure {
    pub(super) name: &'static str,
    pub(super) definition: &'static str,
    pub(super) of: fn(&LatencyHistograms) -> &Histogram<u64>,
}

/// Times shown in a report. The last three need the server's timestamps.
pub(super) const TIMES: [TimeFigure; 6] = [
    TimeFigure {
        name: "TTFT",
        definition: "from a request's scheduled start until the read that returned its first token",
        of: |times| &times.ttft,
    },
    TimeFigure {
        name: "Inter-token latency",
        definition: "between the reads that returned two tokens of a stream",
        of: |times| &times.gaps,
    },
    TimeFigure {
        name: "TPOT",
        definition: "of each request: (last token − first token) / (tokens − 1)",
        of: |times| &times.tpot,
    },
    TimeFigure {
        name: "One-way latency",
        definition: "from the device's emission to the read that returned the token",
        of: |times| &times.one_way,
    },
    TimeFigure {
        name: "Schedule lateness",
        definition: "from a token's scheduled time until the read that returned it",
        of: |times| &times.lateness,
    },
    TimeFigure {
        name: "Runner lateness",
        definition: "from a token's scheduled time until the device emitted it",
        of: |times| &times.runner,
    },
];

pub(super) fn render_tables(comparison: &Comparison) -> String {
    let servers = &comparison.servers;
    let rounds = match servers.iter().map(|server| server.rounds.len()).max() {
        Some(1) | None => "one round".to_owned(),
        Some(rounds) => format!("{rounds} rounds, in which the servers took turns"),
    };
    let mut lines = vec![format!("{}; {rounds}", comparison.title()), String::new()];
    lines.extend(rate_table(servers));
    for time in &TIMES {
        lines.extend(time_table(servers, time));
    }
    for server in servers {
        if let Some(why) = server.why_latency_unknown() {
            let name = &server.server.name;
            lines.push(format!("\n{name}: one-way latency is unknown: {why}"));
        }
    }
    lines.join("\n")
}

fn rate_table(servers: &[ServerResults]) -> Vec<String> {
    let mut columns = RATES.map(|(name, ..)| name).to_vec();
    columns.push("lost requests");
    let mut lines = vec![
        "Rates (median of the rounds, lowest to highest for tokens/s)".to_owned(),
        format_head("server", &columns),
    ];
    for server in servers {
        let median = |(_, decimals, rate): RateColumn| {
            format_number(server.spread(rate).map(|spread| spread.median), decimals)
        };
        let mut cells = RATES.map(median).to_vec();
        cells.push(format_cell(server.lost_requests()));
        if let Some(spread) = server.spread(|rates| rates.tokens_per_second) {
            cells.push(format!("  ({:.0} to {:.0})", spread.lowest, spread.highest));
        }
        lines.push(format_row(&server.server.name, &cells));
    }
    lines
}

/// Returns a table with the percentiles of a time, for the servers for which the time is known.
fn time_table(servers: &[ServerResults], time: &TimeFigure) -> Vec<String> {
    let known = servers
        .iter()
        .filter(|server| !(time.of)(&server.times).is_empty());
    let rows: Vec<_> = known
        .map(|server| {
            let times = Percentiles::from_histogram((time.of)(&server.times));
            let times = [times.p50, times.p90, times.p99, times.p999, times.max];
            let cells = times.map(|us| format_number(Some(us / 1e3), 3));
            format_row(&server.server.name, &cells)
        })
        .collect();
    if rows.is_empty() {
        return rows;
    }
    let columns = ["p50", "p90", "p99", "p99.9", "max"];
    let title = format!("\n{}, ms: {}", time.name, time.definition);
    let head = [title, format_head("server", &columns)];
    head.into_iter().chain(rows).collect()
}
