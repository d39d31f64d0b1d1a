//! The values that the HTML template of a comparison shows.

use plotters::style::RGBColor;
use serde_json::{Value, json};

use super::results::{Comparison, ServerResults};
use super::table::{self, TIMES, TimeFigure};
use crate::report::{Axis, Bar, COLORS, Curve, quantiles};

pub(super) fn page_values(comparison: &Comparison) -> Value {
    let servers = &comparison.servers;
    let times = TIMES.map(|time| {
        let caption = format!("{}: {}. Left is better.", time.name, time.definition);
        json!({ "chart": time_chart(servers, &time), "caption": caption })
    });
    json!({
        "machine": comparison.machine,
        "load": comparison.title(),
        "throughput": throughput_chart(servers),
        "times": times,
        "text": table::render_tables(comparison),
        "faults": comparison.faults(),
    })
}

fn with_colors(servers: &[ServerResults]) -> impl Iterator<Item = (&ServerResults, RGBColor)> {
    servers.iter().zip(COLORS.iter().copied().cycle())
}

fn throughput_chart(servers: &[ServerResults]) -> String {
    let bars = with_colors(servers).filter_map(|(server, color)| {
        Some(Bar {
            title: &server.server.name,
            color,
            spread: server.spread(|rates| rates.tokens_per_second)?,
        })
    });
    Bar::draw_svg(&bars.collect::<Vec<_>>(), "tokens per second")
}

fn time_chart(servers: &[ServerResults], time: &TimeFigure) -> String {
    let curves = with_colors(servers).map(|(server, color)| Curve {
        title: &server.server.name,
        color,
        points: quantiles((time.of)(&server.times)),
    });
    let known: Vec<_> = curves.filter(|curve| !curve.points.is_empty()).collect();
    let x_name = format!("{}, µs (logarithmic)", time.name);
    Axis::Logarithmic.draw_svg([&x_name, "values within it, %"], &known)
}
