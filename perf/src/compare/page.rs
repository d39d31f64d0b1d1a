//! A comparison as an HTML page.

use std::io;
use std::path::Path;

use plotters::style::RGBColor;

use super::results::{Comparison, ServerResults};
use super::table::{self, TIMES, Time};
use crate::report::{Axis, Bar, Chart, ChartError, Curve, Page, quantiles};

const INTRODUCTION: &str = "
<p>One client put the same load on each of these servers, on the same machine, and the servers took turns round
by round: compare them with each other, not with figures of another machine. The client is one thread that
reads, checks and records the time at which each read returned. A record of a stream counts as one token. If a
server's tokens carry no emission times, only the client's view is known: a delay that is the same for all
tokens is then part of the time to the first token, and of no other figure.</p>";

/// Colors that most people with a color vision deficiency can tell apart.
const COLORS: [RGBColor; 6] = [
    RGBColor(20, 90, 200),
    RGBColor(215, 95, 0),
    RGBColor(0, 130, 90),
    RGBColor(160, 40, 120),
    RGBColor(110, 110, 110),
    RGBColor(90, 170, 220),
];

/// Writes the page.
pub(super) fn write(path: &Path, comparison: &Comparison) -> io::Result<()> {
    page(comparison).map_err(io::Error::other)?.save(path)
}

fn page(comparison: &Comparison) -> Result<Page, ChartError> {
    let servers = &comparison.servers;
    let mut page = Page::new("Servers compared", INTRODUCTION);
    page.machine(&comparison.machine);
    page.heading(&comparison.title());
    page.figure(&throughput(servers)?, "Longer is better.");
    for time in &TIMES {
        let caption = format!("{}: {}. Left is better.", time.name, time.definition);
        page.figure(&curves(servers, time)?, &caption);
    }
    let mut text = table::text(comparison);
    for fault in comparison.faults() {
        text.push_str("\nFAULT ");
        text.push_str(&fault);
    }
    page.text("", "All figures", &text);
    Ok(page)
}

fn colored(servers: &[ServerResults]) -> impl Iterator<Item = (&ServerResults, RGBColor)> {
    servers.iter().zip(COLORS.iter().copied().cycle())
}

fn throughput(servers: &[ServerResults]) -> Result<String, ChartError> {
    let bars = colored(servers).filter_map(|(server, color)| {
        Some(Bar {
            title: &server.server.name,
            color,
            spread: server.spread(|round| round.tokens_per_second)?,
        })
    });
    Bar::draw(&bars.collect::<Vec<_>>(), "tokens per second")
}

fn curves(servers: &[ServerResults], time: &Time) -> Result<String, ChartError> {
    let curves = colored(servers).map(|(server, color)| Curve {
        title: &server.server.name,
        color,
        points: quantiles((time.of)(&server.times)),
    });
    let known: Vec<_> = curves.filter(|curve| !curve.points.is_empty()).collect();
    let chart = Chart {
        x_name: &format!("{}, µs (logarithmic)", time.name),
        y_name: "values within it, %",
        axis: Axis::Logarithmic,
    };
    chart.curves(&known)
}
