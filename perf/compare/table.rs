//! A comparison on a terminal: one block for each figure, one line for each server.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use super::Asked;
use super::results::{Measured, Round};
use crate::load::Times;
use crate::overhead::drawing::us;

/// A time's name, its definition, and where it is.
pub(super) type Time = (&'static str, &'static str, fn(&Times) -> &Histogram<u64>);

/// The times that are known of any server.
pub(super) const TIMES: [Time; 3] = [
    (
        "TTFT",
        "from when a request was due to the read that brought its first token",
        |times| &times.ttft,
    ),
    (
        "Inter-token latency",
        "between the reads that brought two tokens of a stream",
        |times| &times.gaps,
    ),
    (
        "TPOT",
        "of each request, from its first token to its last, over one less than their number",
        |times| &times.tpot,
    ),
];

/// Those that only stamps can tell.
pub(super) const STAMPED: [Time; 3] = [
    (
        "One-way latency",
        "from the device's emission to the read that brought the token",
        |times| &times.one_way,
    ),
    (
        "Schedule lateness",
        "from the time at which a token was due to the read that brought it",
        |times| &times.lateness,
    ),
    (
        "Runner lateness",
        "from the time at which a token was due to its emission, the device's own",
        |times| &times.runner,
    ),
];

const NAME: usize = 30;

/// All blocks.
pub(super) fn text(servers: &[Measured], asked: &Asked) -> String {
    let mut text = format!("{}; {}\n", asked.title(), of_rounds(servers));
    text.push_str(&rates(servers));
    for time in TIMES {
        text.push_str(&block(servers, time));
    }
    for time in STAMPED {
        text.push_str(&block(servers, time));
    }
    for server in servers {
        if let Some(why) = server.stamps.why_unknown() {
            line(
                &mut text,
                &format!(
                    "\n{}: one-way latency is unknown: {why}",
                    server.server.name
                ),
            );
        }
    }
    text.truncate(text.trim_end().len());
    text
}

fn of_rounds(servers: &[Measured]) -> String {
    match servers.iter().map(|server| server.rounds.len()).max() {
        Some(1) | None => "one round".to_owned(),
        Some(rounds) => format!("{rounds} rounds, in which the servers took turns"),
    }
}

fn rates(servers: &[Measured]) -> String {
    let mut text = String::new();
    line(
        &mut text,
        "\nRates (median of the rounds, lowest to highest for tokens/s)",
    );
    let names = [
        "tokens/s",
        "requests/s",
        "tokens/read",
        "bytes/token",
        "lost requests",
    ];
    let names: String = names.map(|name| format!("{name:>15}")).concat();
    line(&mut text, &format!("  {:<NAME$}{names}", "server"));
    for server in servers {
        let median = |value: fn(&Round) -> f64, decimals| {
            cell(server.spread(value).map(|spread| spread.median), decimals)
        };
        let spread = server.spread(|round| round.tokens_per_second);
        let spread = spread.map_or_else(String::new, |spread| {
            format!("  ({:.0} to {:.0})", spread.lowest, spread.highest)
        });
        let row = [
            median(|round| round.tokens_per_second, 0),
            median(|round| round.requests_per_second, 1),
            median(|round| round.tokens_per_read, 1),
            median(|round| round.bytes_per_token, 0),
            format!("{:>15}", server.lost_requests()),
            spread,
        ];
        line(
            &mut text,
            &format!("  {:<NAME$}{}", server.server.name, row.concat()),
        );
    }
    text
}

/// The quantiles of a time, of those servers of which it is known.
fn block(servers: &[Measured], (name, definition, of): Time) -> String {
    let mut rows = String::new();
    for server in servers {
        let times = of(&server.times);
        if times.is_empty() {
            continue;
        }
        let quantiles = [0.5, 0.9, 0.99, 0.999].map(|quantile| times.value_at_quantile(quantile));
        let ms = |ns: u64| cell(Some(us(ns) / 1e3), 3);
        let row: String = quantiles.map(ms).concat();
        let row = format!("  {:<NAME$}{row}{}", server.server.name, ms(times.max()));
        line(&mut rows, &row);
    }
    if rows.is_empty() {
        return rows;
    }
    let names = ["p50", "p90", "p99", "p99.9", "max"].map(|name| format!("{name:>15}"));
    format!(
        "\n{name}, ms: {definition}\n  {:<NAME$}{}\n{rows}",
        "server",
        names.concat()
    )
}

fn line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(
        || format!("{:>15}", "–"),
        |value| format!("{value:>15.decimals$}"),
    )
}
