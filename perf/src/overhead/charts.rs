//! Draws the charts of a run, as SVG.

use hdrhistogram::Histogram;
use plotters::style::RGBColor;

use super::path::MeasuredPath;
use super::results::{CellKey, Results, Round};
use super::scenario::Scenario;
use crate::load_stats::LatencyHistograms;
use crate::report::{Axis, Bar, Curve, QUANTILES, quantiles};
use crate::statistics::percentile_us;

/// Draws the distribution of one-way latency, with one curve for each path.
pub(super) fn latency_chart(results: &Results, scenario: Scenario) -> String {
    let x_name = "one-way latency, µs (logarithmic)";
    let y_name = "tokens within that latency, %";
    distribution_chart(results, scenario, [x_name, y_name], |times| &times.one_way)
}

/// Draws the distribution of the time to the first token, with one curve for each path.
pub(super) fn ttft_chart(results: &Results, scenario: Scenario) -> String {
    let x_name = "time to the first token, µs (logarithmic)";
    let y_name = "requests within that time, %";
    distribution_chart(results, scenario, [x_name, y_name], |times| &times.ttft)
}

fn distribution_chart(
    results: &Results,
    scenario: Scenario,
    names: [&str; 2],
    of: fn(&LatencyHistograms) -> &Histogram<u64>,
) -> String {
    let cells = results.cells_of(scenario);
    let curves = cells.map(|(path, cell)| curve(path, quantiles(of(&cell.times))));
    Axis::Logarithmic.draw_svg(names, &curves.collect::<Vec<_>>())
}

/// Draws, over the quantiles, the latency that each path adds to the latency of its floor.
pub(super) fn added_latency_chart(results: &Results, scenario: Scenario) -> String {
    let curves = results.cells_of(scenario).filter_map(|(path, cell)| {
        let floor = CellKey::new(scenario, path.floor()?);
        let floor = &results.cell(floor)?.times.one_way;
        // Beyond the 99th percentile a quiet machine's own stalls are larger than any server's.
        let quantiles = QUANTILES.iter().filter(|percent| **percent <= 99.0);
        let points = quantiles.map(|percent| {
            let own = percentile_us(&cell.times.one_way, *percent);
            (*percent, own - percentile_us(floor, *percent))
        });
        Some(curve(path, points.collect()))
    });
    let names = ["quantile, %", "added to the floor, µs"];
    Axis::Linear.draw_svg(names, &curves.collect::<Vec<_>>())
}

/// Draws a value over the number of streams, with one curve for each path.
pub(super) fn chart_over_streams(
    results: &Results,
    name: &str,
    streams_of: fn(Scenario) -> Option<u32>,
    value: fn(&Round) -> Option<f64>,
) -> String {
    let mut curves: Vec<Curve<'static>> = Vec::new();
    for (CellKey { scenario, path }, cell) in results.cells() {
        let Some((streams, spread)) = streams_of(scenario).zip(cell.spread(value)) else {
            continue;
        };
        let point = (f64::from(streams), spread.median);
        match curves.iter_mut().find(|curve| curve.title == path.title()) {
            Some(curve) => curve.points.push(point),
            None => curves.push(curve(path, vec![point])),
        }
    }
    // A single number of streams is not a curve.
    curves.retain(|curve| curve.points.len() > 1);
    Axis::Logarithmic.draw_svg(["streams (logarithmic)", name], &curves)
}

/// Draws a value of each path as a bar, with the spread of the rounds.
pub(super) fn bar_chart(
    results: &Results,
    scenario: Scenario,
    name: &str,
    value: fn(&Round) -> Option<f64>,
) -> String {
    let bars = results.cells_of(scenario).filter_map(|(path, cell)| {
        Some(Bar {
            title: path.title(),
            color: path_color(path),
            spread: cell.spread(value)?,
        })
    });
    Bar::draw_svg(&bars.collect::<Vec<_>>(), name)
}

fn curve(path: MeasuredPath, points: Vec<(f64, f64)>) -> Curve<'static> {
    Curve {
        title: path.title(),
        color: path_color(path),
        points,
    }
}

/// Returns the color of a path: pale for a floor, strong for the paths that are compared with it.
fn path_color(path: MeasuredPath) -> RGBColor {
    match path {
        MeasuredPath::Mpsc => RGBColor(150, 150, 150),
        MeasuredPath::RawTcp => RGBColor(90, 90, 90),
        MeasuredPath::BareTonic => RGBColor(150, 190, 240),
        MeasuredPath::BareAxum => RGBColor(245, 190, 130),
        MeasuredPath::Grpc => RGBColor(20, 90, 200),
        MeasuredPath::Ndjson => RGBColor(215, 95, 0),
        MeasuredPath::Sse => RGBColor(160, 40, 120),
        MeasuredPath::Unlogged => RGBColor(150, 150, 150),
        MeasuredPath::Child => RGBColor(150, 90, 0),
        MeasuredPath::TwoTcp => RGBColor(0, 130, 90),
        MeasuredPath::TwoUnix => RGBColor(110, 150, 0),
        MeasuredPath::KeysNdjson => RGBColor(240, 170, 90),
        MeasuredPath::KeysGrpc => RGBColor(110, 160, 230),
        MeasuredPath::TlsNdjson => RGBColor(120, 50, 0),
        MeasuredPath::TlsGrpc => RGBColor(10, 40, 110),
    }
}
