//! Curves and bars as SVG. They know nothing of what is measured.

use hdrhistogram::Histogram;
use plotters::prelude::*;

use super::statistics::{Spread, count};

/// Width and height of these, in pixels.
const SIZE: (u32, u32) = (860, 420);
pub(crate) const FONT: &str = "sans-serif";

/// The quantiles of latency curves, in per cent.
pub(crate) const QUANTILES: [f64; 13] = [
    1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.8, 99.9,
];

/// Why a picture could not be drawn. It is a bug of this program's.
#[derive(Debug, thiserror::Error)]
#[error("a chart could not be drawn: {0}")]
pub(crate) struct ChartError(String);

/// A picture, or nothing where there is nothing to be drawn.
pub(crate) type Drawn = Result<String, ChartError>;

/// A line of a chart.
pub(crate) struct Curve<'a> {
    pub(crate) title: &'a str,
    pub(crate) color: RGBColor,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A bar of a chart, with the spread of its rounds.
pub(crate) struct Bar<'a> {
    pub(crate) title: &'a str,
    pub(crate) color: RGBColor,
    pub(crate) spread: Spread,
}

/// How the horizontal axis is divided.
#[derive(Clone, Copy)]
pub(crate) enum Axis {
    Linear,
    Logarithmic,
}

/// What share of a time's values is how long, in microseconds and per cent.
pub(crate) fn quantiles(times: &Histogram<u64>) -> Vec<(f64, f64)> {
    if times.is_empty() {
        return Vec::new();
    }
    let place = |percent: &f64| (us(times.value_at_quantile(percent / 100.0)), *percent);
    QUANTILES.iter().map(place).collect()
}

/// Draws lines with their legend.
pub(crate) fn draw_curves(curves: &[Curve<'_>], x_name: &str, y_name: &str, axis: Axis) -> Drawn {
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
    draw(SIZE, |area| {
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
            let style = curve.color.stroke_width(2);
            let points = curve.points.iter().map(|(x, y)| (axis.place(*x), *y));
            let line = LineSeries::new(points, style).point_size(2);
            chart
                .draw_series(line)?
                .label(curve.title)
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

/// Draws bars, one below the other.
pub(crate) fn draw_bars(bars: &[Bar<'_>], name: &str) -> Drawn {
    let highest = bars.iter().map(|bar| bar.spread.highest);
    let highest = highest.fold(0.0, f64::max) * 1.1;
    let titles: Vec<_> = bars.iter().map(|bar| bar.title).collect();
    let Some(last) = bars.len().checked_sub(1) else {
        return Ok(String::new());
    };
    draw(SIZE, |area| {
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
        chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
            let (low, high) = (SegmentValue::Exact(at), SegmentValue::Exact(at + 1));
            let mut area =
                Rectangle::new([(0.0, low), (bar.spread.median, high)], bar.color.filled());
            area.set_margin(6, 6, 0, 0);
            area
        }))?;
        chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
            let at = SegmentValue::CenterOf(at);
            PathElement::new(
                vec![(bar.spread.lowest, at.clone()), (bar.spread.highest, at)],
                BLACK,
            )
        }))?;
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

/// Draws on a white sheet of this width and height, in pixels.
pub(crate) fn draw(
    size: (u32, u32),
    paint: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Drawn {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
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

/// Nanoseconds as microseconds.
pub(crate) fn us(ns: u64) -> f64 {
    count(ns) / 1e3
}
