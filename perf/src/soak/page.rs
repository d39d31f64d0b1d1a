//! A run as an HTML page.

use std::io;
use std::path::Path;

use plotters::style::RGBColor;

use super::outcome::SoakOutcome;
use super::sample::Sample;
use super::table;
use crate::report::{Axis, Chart, ChartError, Curve, Page};
use crate::statistics::count;

const INTRODUCTION: &str = "
<p>A server was put under a mixed load for a while: complete streams through both APIs, with every token
checked; streams that their clients left; readers that stopped reading; malformed requests. The charts show
the resources of its process under that load. After all clients had left, it had to hold no more than before
the load.</p>";

const COLORS: [RGBColor; 3] = [
    RGBColor(20, 90, 200),
    RGBColor(215, 95, 0),
    RGBColor(0, 130, 90),
];

/// A curve's title, and its value in a sample.
type Value = (&'static str, fn(&Sample) -> f64);

/// Writes the page.
pub(super) fn write(path: &Path, outcome: &SoakOutcome) -> io::Result<()> {
    page(outcome).map_err(io::Error::other)?.save(path)
}

fn page(outcome: &SoakOutcome) -> Result<Page, ChartError> {
    let mut page = Page::new("A server under load for a while", INTRODUCTION);
    let class = if outcome.is_good() { "pass" } else { "fail" };
    for line in outcome.verdict() {
        page.paragraph(class, &line);
    }
    let memory: [Value; 1] = [("RSS", |sample| count(sample.rss_bytes) / (1024.0 * 1024.0))];
    let held: [Value; 3] = [
        ("descriptors", |sample| count(sample.descriptors)),
        ("connections", |sample| count(sample.connections)),
        ("threads", |sample| count(sample.threads)),
    ];
    let requests: [Value; 3] = [
        ("requests in flight", |sample| count(sample.in_flight)),
        ("occupied slots", |sample| count(sample.sequences)),
        ("queued", |sample| count(sample.queued)),
    ];
    page.figure(
        &over_time(outcome, "MiB", &memory)?,
        "Resident memory. It may rise until the allocator holds enough for a peak, and then must stay.",
    );
    page.figure(
        &over_time(outcome, "count", &held)?,
        "Descriptors, the connections among them, and threads.",
    );
    page.figure(
        &over_time(outcome, "count", &requests)?,
        "Requests in flight, those with a slot of the device, and those that wait.",
    );
    page.text("", "Clients", &table::totals(&outcome.tally));
    let rows = [&outcome.before, &outcome.after].map(table::row).join("\n");
    let idle = format!("{}\n{rows}", table::head());
    page.text("", "Without clients: before the load, and after it", &idle);
    Ok(page)
}

fn over_time(outcome: &SoakOutcome, y_name: &str, values: &[Value]) -> Result<String, ChartError> {
    let curves = values
        .iter()
        .zip(COLORS)
        .map(|((title, value), color)| Curve {
            title,
            color,
            points: outcome
                .steady
                .iter()
                .map(|sample| (sample.seconds, value(sample)))
                .collect(),
        });
    let chart = Chart {
        x_name: "seconds",
        y_name,
        axis: Axis::Time,
    };
    chart.curves(&curves.collect::<Vec<_>>())
}
