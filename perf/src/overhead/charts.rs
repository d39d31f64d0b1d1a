//! The charts of a run, as SVG.

use hdrhistogram::Histogram;
use plotters::style::RGBColor;

use super::path::MeasuredPath;
use super::results::{CellKey, Results, Round};
use super::scenario::Scenario;
use crate::figures::Times;
use crate::report::{Axis, Bar, Curve, QUANTILES, quantiles};
use crate::statistics::percentile_us;

/// Distribution of one-way latency, path by path.
pub(super) fn latency(results: &Results, scenario: Scenario) -> String {
    let x_name = "one-way latency, µs (logarithmic)";
    let y_name = "tokens that came within it, %";
    distribution(results, scenario, [x_name, y_name], |times| &times.one_way)
}

/// Distribution of the time to the first token, path by path.
pub(super) fn ttft(results: &Results, scenario: Scenario) -> String {
    let x_name = "time to the first token, µs (logarithmic)";
    let y_name = "requests that had it within that, %";
    distribution(results, scenario, [x_name, y_name], |times| &times.ttft)
}

fn distribution(
    results: &Results,
    scenario: Scenario,
    names: [&str; 2],
    of: fn(&Times) -> &Histogram<u64>,
) -> String {
    let cells = results.of_scenario(scenario);
    let curves = cells.map(|(path, cell)| curve(path, quantiles(of(&cell.times))));
    Axis::Logarithmic.draw(names, &curves.collect::<Vec<_>>())
}

/// Latency that each path adds to its floor's, quantile by quantile.
pub(super) fn added(results: &Results, scenario: Scenario) -> String {
    let curves = results.of_scenario(scenario).filter_map(|(path, cell)| {
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
    let names = ["quantile, %", "added to its floor, µs"];
    Axis::Linear.draw(names, &curves.collect::<Vec<_>>())
}

/// A value over the number of streams, path by path.
pub(super) fn over_streams(
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
    Axis::Logarithmic.draw(["streams (logarithmic)", name], &curves)
}

/// A value of each path as a bar, with the spread of the rounds.
pub(super) fn bars(
    results: &Results,
    scenario: Scenario,
    name: &str,
    value: fn(&Round) -> Option<f64>,
) -> String {
    let bars = results.of_scenario(scenario).filter_map(|(path, cell)| {
        Some(Bar {
            title: path.title(),
            color: color(path),
            spread: cell.spread(value)?,
        })
    });
    Bar::draw(&bars.collect::<Vec<_>>(), name)
}

fn curve(path: MeasuredPath, points: Vec<(f64, f64)>) -> Curve<'static> {
    Curve {
        title: path.title(),
        color: color(path),
        points,
    }
}

/// Color of a path: pale for a floor, and strong for the paths above it.
fn color(path: MeasuredPath) -> RGBColor {
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
    }
}
