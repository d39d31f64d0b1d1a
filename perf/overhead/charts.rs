//! The pictures of a run, as SVG.

use hdrhistogram::Histogram;
use plotters::style::RGBColor;

use super::drawing::{Axis, Bar, Curve, Drawn, QUANTILES, draw_bars, draw_curves, quantiles, us};
use super::lane::Lane;
use super::results::{Place, Results, Round};
use super::scenario::Scenario;
use crate::load::Times;

/// What share of a lane's tokens came within which time.
pub(super) fn latency(results: &Results, scenario: Scenario) -> Drawn {
    let names = (
        "one-way latency, µs (logarithmic)",
        "tokens that came within it, %",
    );
    within(results, scenario, names, |times| &times.one_way)
}

/// What share of a lane's requests had their first token within which time.
pub(super) fn ttft(results: &Results, scenario: Scenario) -> Drawn {
    let names = (
        "time to the first token, µs (logarithmic)",
        "requests that had it within that, %",
    );
    within(results, scenario, names, |times| &times.ttft)
}

fn within(
    results: &Results,
    scenario: Scenario,
    (x_name, y_name): (&str, &str),
    histogram: fn(&Times) -> &Histogram<u64>,
) -> Drawn {
    let cells = results.cells().filter(|(of, ..)| *of == scenario);
    let curves: Vec<_> = cells
        .map(|(_, lane, cell)| curve(lane, quantiles(histogram(&cell.times))))
        .collect();
    draw_curves(&curves, x_name, y_name, Axis::Logarithmic)
}

/// What each door adds to its floor's latency, quantile by quantile.
pub(super) fn added(results: &Results, scenario: Scenario) -> Drawn {
    let cells = results.cells().filter(|(of, ..)| *of == scenario);
    let curves = cells.filter_map(|(_, lane, cell)| {
        let floor = &results.cell(Place(scenario, lane.floor()?))?.times.one_way;
        let times = &cell.times.one_way;
        // Beyond the 99th percentile a quiet machine's own stalls are larger than any server's.
        let quantiles = QUANTILES.iter().filter(|percent| **percent <= 99.0);
        let points = quantiles.map(|percent| {
            let quantile = percent / 100.0;
            let (mine, its) = (
                us(times.value_at_quantile(quantile)),
                us(floor.value_at_quantile(quantile)),
            );
            (*percent, mine - its)
        });
        Some(curve(lane, points.collect()))
    });
    draw_curves(
        &curves.collect::<Vec<_>>(),
        "quantile, %",
        "added to its floor, µs",
        Axis::Linear,
    )
}

/// A value over the number of streams.
pub(super) fn over_streams(
    results: &Results,
    name: &str,
    streams_of: fn(Scenario) -> Option<u32>,
    value: fn(&Round) -> Option<f64>,
) -> Drawn {
    let mut curves: Vec<Curve<'static>> = Vec::new();
    for (scenario, lane, cell) in results.cells() {
        let point = streams_of(scenario).zip(cell.spread(value));
        let Some((streams, spread)) = point else {
            continue;
        };
        let point = (f64::from(streams), spread.median);
        match curves.iter_mut().find(|curve| curve.title == lane.title()) {
            Some(curve) => curve.points.push(point),
            None => curves.push(curve(lane, vec![point])),
        }
    }
    // A single number of streams makes no curve.
    curves.retain(|curve| curve.points.len() > 1);
    draw_curves(&curves, "streams (logarithmic)", name, Axis::Logarithmic)
}

/// A value of each lane as a bar, with the rounds' spread.
pub(super) fn bars(
    results: &Results,
    scenario: Scenario,
    name: &str,
    value: fn(&Round) -> Option<f64>,
) -> Drawn {
    let cells = results.cells().filter(|(of, ..)| *of == scenario);
    let bars: Vec<_> = cells
        .filter_map(|(_, lane, cell)| {
            Some(Bar {
                title: lane.title(),
                color: color(lane),
                spread: cell.spread(value)?,
            })
        })
        .collect();
    draw_bars(&bars, name)
}

fn curve(lane: Lane, points: Vec<(f64, f64)>) -> Curve<'static> {
    Curve {
        title: lane.title(),
        color: color(lane),
        points,
    }
}

/// A lane's color: a floor's is pale, and those of its lanes are strong.
fn color(lane: Lane) -> RGBColor {
    match lane {
        Lane::Mpsc => RGBColor(150, 150, 150),
        Lane::RawTcp => RGBColor(90, 90, 90),
        Lane::BareTonic => RGBColor(150, 190, 240),
        Lane::BareAxum => RGBColor(245, 190, 130),
        Lane::Grpc => RGBColor(20, 90, 200),
        Lane::Ndjson => RGBColor(215, 95, 0),
        Lane::Sse => RGBColor(160, 40, 120),
        Lane::Child => RGBColor(150, 90, 0),
        Lane::TwoTcp => RGBColor(0, 130, 90),
        Lane::TwoUnix => RGBColor(110, 150, 0),
    }
}
