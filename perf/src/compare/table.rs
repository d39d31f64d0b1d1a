//! A comparison on a terminal: one block for each figure, with one line for each server.

use hdrhistogram::Histogram;

use super::results::{Comparison, ServerResults};
use crate::figures::{Rates, Times};
use crate::report::{cell, head, number, row};
use crate::statistics::Percentiles;

/// A rate: its name, its number of decimals and its value.
type Rate = (&'static str, usize, fn(&Rates) -> f64);

const RATES: [Rate; 4] = [
    ("tokens/s", 0, |rates| rates.tokens_per_second),
    ("requests/s", 1, |rates| rates.requests_per_second),
    ("tokens/read", 1, |rates| rates.tokens_per_read),
    ("bytes/token", 0, |rates| rates.bytes_per_token),
];

/// One of the times, with its definition.
pub(super) struct Time {
    pub(super) name: &'static str,
    pub(super) definition: &'static str,
    pub(super) of: fn(&Times) -> &Histogram<u64>,
}

/// Times in reports. Those after the first three need stamps.
pub(super) const TIMES: [Time; 6] = [
    Time {
        name: "TTFT",
        definition: "from the time at which a request was due to the read that returned its first token",
        of: |times| &times.ttft,
    },
    Time {
        name: "Inter-token latency",
        definition: "between the reads that returned two tokens of a stream",
        of: |times| &times.gaps,
    },
    Time {
        name: "TPOT",
        definition: "of each request: (last token − first token) / (tokens − 1)",
        of: |times| &times.tpot,
    },
    Time {
        name: "One-way latency",
        definition: "from the device's emission to the read that returned the token",
        of: |times| &times.one_way,
    },
    Time {
        name: "Schedule lateness",
        definition: "from the time at which a token was due to the read that returned it",
        of: |times| &times.lateness,
    },
    Time {
        name: "Runner lateness",
        definition: "from the time at which a token was due to its emission, the device's own delay",
        of: |times| &times.runner,
    },
];

/// All blocks.
pub(super) fn text(comparison: &Comparison) -> String {
    let servers = &comparison.servers;
    let rounds = match servers.iter().map(|server| server.rounds.len()).max() {
        Some(1) | None => "one round".to_owned(),
        Some(rounds) => format!("{rounds} rounds, in which the servers took turns"),
    };
    let mut lines = vec![format!("{}; {rounds}", comparison.title()), String::new()];
    lines.extend(rates(servers));
    for time in &TIMES {
        lines.extend(block(servers, time));
    }
    for server in servers {
        if let Some(why) = server.why_unknown() {
            let name = &server.server.name;
            lines.push(format!("\n{name}: one-way latency is unknown: {why}"));
        }
    }
    lines.join("\n")
}

fn rates(servers: &[ServerResults]) -> Vec<String> {
    let mut columns = RATES.map(|(name, ..)| name).to_vec();
    columns.push("lost requests");
    let mut lines = vec![
        "Rates (median of the rounds, lowest to highest for tokens/s)".to_owned(),
        head("server", &columns),
    ];
    for server in servers {
        let median = |(_, decimals, rate): Rate| {
            number(server.spread(rate).map(|spread| spread.median), decimals)
        };
        let mut cells = RATES.map(median).to_vec();
        cells.push(cell(server.lost_requests()));
        if let Some(spread) = server.spread(|rates| rates.tokens_per_second) {
            cells.push(format!("  ({:.0} to {:.0})", spread.lowest, spread.highest));
        }
        lines.push(row(&server.server.name, &cells));
    }
    lines
}

/// Percentiles of a time, of the servers for which it is known.
fn block(servers: &[ServerResults], time: &Time) -> Vec<String> {
    let known = servers
        .iter()
        .filter(|server| !(time.of)(&server.times).is_empty());
    let rows: Vec<_> = known
        .map(|server| {
            let times = Percentiles::of((time.of)(&server.times));
            let times = [times.p50, times.p90, times.p99, times.p999, times.max];
            let cells = times.map(|us| number(Some(us / 1e3), 3));
            row(&server.server.name, &cells)
        })
        .collect();
    if rows.is_empty() {
        return rows;
    }
    let columns = ["p50", "p90", "p99", "p99.9", "max"];
    let title = format!("\n{}, ms: {}", time.name, time.definition);
    let head = [title, head("server", &columns)];
    head.into_iter().chain(rows).collect()
}
