//! The values of a run's page.

use serde_json::{Value, json};

use super::outcome::SoakOutcome;
use super::sample::Sample;
use super::table;
use crate::report::{Axis, COLORS, Curve};
use crate::statistics::count;

/// A curve: its title, and its value in a sample.
type Line = (&'static str, fn(&Sample) -> f64);

const MEMORY: [Line; 1] = [("RSS", |sample| count(sample.rss_bytes) / (1024.0 * 1024.0))];
const HELD: [Line; 3] = [
    ("descriptors", |sample| count(sample.descriptors)),
    ("connections", |sample| count(sample.connections)),
    ("threads", |sample| count(sample.threads)),
];
const REQUESTS: [Line; 3] = [
    ("requests in flight", |sample| count(sample.in_flight)),
    ("occupied slots", |sample| count(sample.sequences)),
    ("queued", |sample| count(sample.queued)),
];

pub(super) fn values(outcome: &SoakOutcome) -> Value {
    let rows = [
        table::head(),
        table::row(&outcome.before),
        table::row(&outcome.after),
    ];
    json!({
        "class": if outcome.is_good() { "pass" } else { "fail" },
        "verdict": outcome.verdict(),
        "memory": over_time(outcome, "MiB", &MEMORY),
        "held": over_time(outcome, "count", &HELD),
        "requests": over_time(outcome, "count", &REQUESTS),
        "totals": table::totals(&outcome.tally),
        "idle": rows.join("\n"),
    })
}

fn over_time(outcome: &SoakOutcome, y_name: &str, lines: &[Line]) -> String {
    let curves = lines.iter().zip(COLORS).map(|((title, value), color)| {
        let samples = outcome.steady.iter();
        let points = samples.map(|sample| (sample.seconds, value(sample)));
        Curve {
            title,
            color,
            points: points.collect(),
        }
    });
    Axis::Linear.draw(["seconds", y_name], &curves.collect::<Vec<_>>())
}
