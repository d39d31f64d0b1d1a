//! The pictures of a run, as SVG.

use hdrhistogram::Histogram;
use plotters::prelude::*;

use super::lane::Lane;
use super::results::{Cell, Place, Results, Round};
use super::scenario::Scenario;
use super::statistics::count;
use crate::load::Times;

/// Width and height, in pixels.
const SIZE: (u32, u32) = (860, 420);
const FONT: &str = "sans-serif";

/// The quantiles of latency curves, in per cent.
const QUANTILES: [f64; 13] = [
    1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.8, 99.9,
];

/// Why a picture could not be drawn. It is a bug of this program's.
#[derive(Debug, thiserror::Error)]
#[error("a chart could not be drawn: {0}")]
pub(super) struct ChartError(String);

type Drawn = Result<String, ChartError>;

/// A line of a chart: whose it is, and its points.
struct Curve {
    lane: Lane,
    points: Vec<(f64, f64)>,
}

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
    let curves = curves_of(results, scenario, |cell| {
        let times = histogram(&cell.times);
        QUANTILES
            .iter()
            .map(|percent| (us(times.value_at_quantile(percent / 100.0)), *percent))
            .collect()
    });
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
        let points = points.collect();
        Some(Curve { lane, points })
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
    let mut curves: Vec<Curve> = Vec::new();
    for (scenario, lane, cell) in results.cells() {
        let point = streams_of(scenario).zip(cell.spread(value));
        let Some((streams, spread)) = point else {
            continue;
        };
        let point = (f64::from(streams), spread.median);
        match curves.iter_mut().find(|curve| curve.lane == lane) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve {
                lane,
                points: vec![point],
            }),
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
        .filter_map(|(_, lane, cell)| Some((lane, cell.spread(value)?)))
        .collect();
    let highest = bars.iter().map(|(_, spread)| spread.highest);
    let highest = highest.fold(0.0, f64::max) * 1.1;
    let titles: Vec<_> = bars.iter().map(|(lane, _)| lane.title()).collect();
    let Some(last) = bars.len().checked_sub(1) else {
        return Ok(String::new());
    };
    draw(|area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(50)
            .y_label_area_size(190)
            .build_cartesian_2d(0.0..highest, (0..last).into_segmented())?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .x_desc(name)
            .y_label_formatter(&|segment| match segment {
                SegmentValue::CenterOf(at) => titles.get(*at).copied().unwrap_or("").to_owned(),
                SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
            })
            .label_style((FONT, 14))
            .draw()?;
        chart.draw_series(bars.iter().enumerate().map(|(at, (lane, spread))| {
            let (low, high) = (SegmentValue::Exact(at), SegmentValue::Exact(at + 1));
            let mut bar =
                Rectangle::new([(0.0, low), (spread.median, high)], color(*lane).filled());
            bar.set_margin(6, 6, 0, 0);
            bar
        }))?;
        chart.draw_series(bars.iter().enumerate().map(|(at, (_, spread))| {
            let at = SegmentValue::CenterOf(at);
            PathElement::new(
                vec![(spread.lowest, at.clone()), (spread.highest, at)],
                BLACK,
            )
        }))?;
        Ok(())
    })
}

/// How the horizontal axis is divided.
#[derive(Clone, Copy)]
enum Axis {
    Linear,
    Logarithmic,
}

fn curves_of(
    results: &Results,
    scenario: Scenario,
    points: impl Fn(&Cell) -> Vec<(f64, f64)>,
) -> Vec<Curve> {
    let cells = results.cells().filter(|(of, ..)| *of == scenario);
    cells
        .map(|(_, lane, cell)| Curve {
            lane,
            points: points(cell),
        })
        .collect()
}

fn draw_curves(curves: &[Curve], x_name: &str, y_name: &str, axis: Axis) -> Drawn {
    let points = || {
        let points = curves.iter().flat_map(|curve| &curve.points);
        points.map(|(x, y)| (axis.place(*x), *y))
    };
    if points().next().is_none() {
        return Ok(String::new());
    }
    let (left, right) = ends(points().map(|(x, _)| x));
    let (low, high) = ends(points().map(|(_, y)| y));
    // A line needs room on both sides, also where all points are one.
    let room = ((high - low) * 0.04).max(0.5);
    draw(|area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(50)
            .y_label_area_size(80)
            .build_cartesian_2d(
                left..right.max(left + 0.1),
                (low - room).min(0.0)..high + room,
            )?;
        chart
            .configure_mesh()
            .x_desc(x_name)
            .y_desc(y_name)
            .x_label_formatter(&|x| axis.label(*x))
            .label_style((FONT, 14))
            .draw()?;
        for curve in curves {
            let style = color(curve.lane).stroke_width(2);
            let points = curve.points.iter().map(|(x, y)| (axis.place(*x), *y));
            let line = LineSeries::new(points, style).point_size(2);
            chart
                .draw_series(line)?
                .label(curve.lane.title())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 14))
            .position(SeriesLabelPosition::LowerRight)
            .draw()?;
        Ok(())
    })
}

impl Axis {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.max(0.1).log10(),
        }
    }

    fn label(self, place: f64) -> String {
        match self {
            Self::Linear => format!("{place:.0}"),
            Self::Logarithmic => {
                let value = 10_f64.powf(place);
                format!("{value:.0}")
            }
        }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Draws on a white sheet.
fn draw(paint: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>) -> Drawn {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let painted = area
        .fill(&WHITE)
        .map_err(Into::into)
        .and_then(|()| paint(&area))
        .and_then(|()| Ok(area.present()?));
    painted.map_err(|error| ChartError(error.to_string()))?;
    drop(area);
    Ok(svg)
}

fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

fn us(ns: u64) -> f64 {
    count(ns) / 1e3
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
        Lane::TwoTcp => RGBColor(0, 130, 90),
        Lane::TwoUnix => RGBColor(110, 150, 0),
    }
}
