//! The values of a run's page.

use plotters::style::RGBColor;
use serde_json::{Value, json};

use super::outcome::SoakOutcome;
use super::sample::Sample;
use super::table;
use crate::report::{Axis, Chart, Curve};
use crate::statistics::count;

/// A curve: its title, its color and its value in a sample.
type Line = (&'static str, RGBColor, fn(&Sample) -> f64);

const BLUE: RGBColor = RGBColor(20, 90, 200);
const ORANGE: RGBColor = RGBColor(215, 95, 0);
const GREEN: RGBColor = RGBColor(0, 130, 90);

const MEMORY: [Line; 1] = [("RSS", BLUE, |sample| {
    count(sample.rss_bytes) / (1024.0 * 1024.0)
})];
const HELD: [Line; 3] = [
    ("descriptors", BLUE, |sample| count(sample.descriptors)),
    ("connections", ORANGE, |sample| count(sample.connections)),
    ("threads", GREEN, |sample| count(sample.threads)),
];
const REQUESTS: [Line; 3] = [
    ("requests in flight", BLUE, |sample| count(sample.in_flight)),
    ("occupied slots", ORANGE, |sample| count(sample.sequences)),
    ("queued", GREEN, |sample| count(sample.queued)),
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
    let curves = lines.iter().map(|(title, color, value)| {
        let samples = outcome.steady.iter();
        let points = samples.map(|sample| (sample.seconds, value(sample)));
        Curve {
            title,
            color: *color,
            points: points.collect(),
        }
    });
    let chart = Chart {
        x_name: "seconds",
        y_name,
        axis: Axis::Linear,
    };
    chart.curves(&curves.collect::<Vec<_>>())
}
