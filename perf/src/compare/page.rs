//! The values of a comparison's page.

use plotters::style::RGBColor;
use serde_json::{Value, json};

use super::results::{Comparison, ServerResults};
use super::table::{self, TIMES, Time};
use crate::report::{Axis, Bar, COLORS, Curve, quantiles};

pub(super) fn values(comparison: &Comparison) -> Value {
    let servers = &comparison.servers;
    let times = TIMES.map(|time| {
        let caption = format!("{}: {}. Left is better.", time.name, time.definition);
        json!({ "chart": curves(servers, &time), "caption": caption })
    });
    json!({
        "machine": comparison.machine,
        "load": comparison.title(),
        "throughput": throughput(servers),
        "times": times,
        "text": table::text(comparison),
        "faults": comparison.faults(),
    })
}

fn colored(servers: &[ServerResults]) -> impl Iterator<Item = (&ServerResults, RGBColor)> {
    servers.iter().zip(COLORS.iter().copied().cycle())
}

fn throughput(servers: &[ServerResults]) -> String {
    let bars = colored(servers).filter_map(|(server, color)| {
        Some(Bar {
            title: &server.server.name,
            color,
            spread: server.spread(|rates| rates.tokens_per_second)?,
        })
    });
    Bar::draw(&bars.collect::<Vec<_>>(), "tokens per second")
}

fn curves(servers: &[ServerResults], time: &Time) -> String {
    let curves = colored(servers).map(|(server, color)| Curve {
        title: &server.server.name,
        color,
        points: quantiles((time.of)(&server.times)),
    });
    let known: Vec<_> = curves.filter(|curve| !curve.points.is_empty()).collect();
    let x_name = format!("{}, µs (logarithmic)", time.name);
    Axis::Logarithmic.draw([&x_name, "values within it, %"], &known)
}
