//! The values that the HTML template of a soak run shows.

use serde_json::{Value, json};

use super::outcome::SoakOutcome;
use super::sample::Sample;
use super::table;
use crate::report::{Axis, COLORS, Curve};
use crate::statistics::count_to_f64;

/// A curve over time: its title, and the value that it shows of a sample.
type SampleCurve = (&'static str, fn(&Sample) -> f64);

const MEMORY_CURVES: [SampleCurve; 2] = [
    ("RSS", |sample| mib(sample.rss_bytes)),
    ("prefix cache", |sample| mib(sample.prefix_cache_bytes)),
];
const RESOURCE_CURVES: [SampleCurve; 3] = [
    ("descriptors", |sample| count_to_f64(sample.descriptors)),
    ("connections", |sample| count_to_f64(sample.connections)),
    ("threads", |sample| count_to_f64(sample.threads)),
];
const REQUEST_CURVES: [SampleCurve; 3] = [
    ("requests in flight", |sample| {
        count_to_f64(sample.in_flight)
    }),
    ("occupied slots", |sample| count_to_f64(sample.sequences)),
    ("queued", |sample| count_to_f64(sample.queued)),
];

pub(super) fn page_values(outcome: &SoakOutcome) -> Value {
    let rows = [
        table::sample_head(),
        table::sample_row(&outcome.before),
        table::sample_row(&outcome.after),
    ];
    json!({
        "class": if outcome.has_passed() { "pass" } else { "fail" },
        "verdict": outcome.verdict_lines(),
        "memory": chart_over_time(outcome, "MiB", &MEMORY_CURVES),
        "held": chart_over_time(outcome, "count", &RESOURCE_CURVES),
        "requests": chart_over_time(outcome, "count", &REQUEST_CURVES),
        "totals": table::behavior_totals(&outcome.tally),
        "idle": rows.join("\n"),
    })
}

fn mib(bytes: u64) -> f64 {
    count_to_f64(bytes) / (1024.0 * 1024.0)
}

fn chart_over_time(outcome: &SoakOutcome, y_name: &str, lines: &[SampleCurve]) -> String {
    let curves = lines.iter().zip(COLORS).map(|((title, value), color)| {
        let samples = outcome.steady.iter();
        let points = samples.map(|sample| (sample.seconds, value(sample)));
        Curve {
            title,
            color,
            points: points.collect(),
        }
    });
    Axis::Linear.draw_svg(["seconds", y_name], &curves.collect::<Vec<_>>())
}
