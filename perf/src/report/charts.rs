//! Draws curves and bars as SVG.

use hdrhistogram::Histogram;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::statistics::{Spread, percentile_us};

/// Width and height of a chart, in pixels.
const CHART_SIZE: (u32, u32) = (860, 420);
/// Number of panels in a row, and the height of each panel in pixels.
const PANEL_COLUMNS: usize = 2;
const PANEL_HEIGHT: u32 = 170;
/// Colors that most people with a color vision deficiency can distinguish.
pub(crate) const COLORS: [RGBColor; 6] = [
    RGBColor(20, 90, 200),
    RGBColor(215, 95, 0),
    RGBColor(0, 130, 90),
    RGBColor(160, 40, 120),
    RGBColor(110, 110, 110),
    RGBColor(90, 170, 220),
];

const FONT: (&str, i32) = ("sans-serif", 14);
/// Quantiles that latency curves show, in percent.
pub(crate) const QUANTILES: [f64; 13] = [
    1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.8, 99.9,
];

type DrawResult = Result<(), Box<dyn std::error::Error>>;

pub(crate) struct Curve<'a> {
    pub(crate) title: &'a str,
    pub(crate) color: RGBColor,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A bar at the median of the rounds, with a line over their range.
pub(crate) struct Bar<'a> {
    pub(crate) title: &'a str,
    pub(crate) color: RGBColor,
    pub(crate) spread: Spread,
}

/// A small bar chart. Several are drawn side by side.
pub(crate) struct Panel<'a> {
    pub(crate) title: &'a str,
    /// Unit of the values, which labels the horizontal axis.
    pub(crate) unit: &'a str,
    pub(crate) bars: Vec<Bar<'a>>,
}

/// Scale of the horizontal axis.
#[derive(Clone, Copy)]
pub(crate) enum Axis {
    /// Linear scale that starts at zero.
    Linear,
    Logarithmic,
}

/// Returns the quantiles of times in nanoseconds, as pairs of microseconds and percent.
pub(crate) fn quantiles(times: &Histogram<u64>) -> Vec<(f64, f64)> {
    if times.is_empty() {
        return Vec::new();
    }
    let point = |percent: &f64| (percentile_us(times, *percent), *percent);
    QUANTILES.iter().map(point).collect()
}

impl Axis {
    /// Draws curves and their legend over axes with these names. Returns an empty string if there are no points.
    pub(crate) fn draw_svg(self, [x_name, y_name]: [&str; 2], curves: &[Curve<'_>]) -> String {
        let axis = self;
        let points = || {
            let points = curves.iter().flat_map(|curve| &curve.points);
            points.map(|(x, y)| (axis.to_position(*x), *y))
        };
        if points().next().is_none() {
            return String::new();
        }
        let (left, right) = axis.range(points().map(|(x, _)| x));
        let (low, high) = min_and_max(points().map(|(_, y)| y));
        // Leave a margin above and below the curves, even if all points are equal.
        let margin = ((high - low) * 0.04).max(0.5);
        draw_svg(CHART_SIZE, |area| {
            let mut chart = ChartBuilder::on(area)
                .margin(10)
                .x_label_area_size(50)
                .y_label_area_size(80)
                .build_cartesian_2d(left..right, (low - margin).min(0.0)..high + margin)?;
            chart
                .configure_mesh()
                .x_desc(x_name)
                .y_desc(y_name)
                .x_label_formatter(&|x| axis.label(*x))
                .label_style(FONT)
                .draw()?;
            for curve in curves {
                let style = curve.color.stroke_width(2);
                let points = curve.points.iter().map(|(x, y)| (axis.to_position(*x), *y));
                let line = LineSeries::new(points, style).point_size(axis.point_size());
                chart
                    .draw_series(line)?
                    .label(curve.title)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
            }
            chart
                .configure_series_labels()
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .label_font(FONT)
                .position(axis.legend_position())
                .draw()?;
            Ok(())
        })
    }
}

impl Bar<'_> {
    /// Draws bars, one below the other. Returns an empty string if there are no bars.
    pub(crate) fn draw_svg(bars: &[Bar<'_>], name: &str) -> String {
        if bars.is_empty() {
            return String::new();
        }
        draw_svg(CHART_SIZE, |area| {
            let mut chart = ChartBuilder::on(area);
            chart
                .margin(10)
                .x_label_area_size(50)
                .y_label_area_size(190);
            draw_bars(&mut chart, bars, name)
        })
    }
}

impl Panel<'_> {
    /// Draws panels in rows of two. Returns an empty string if there are no panels.
    pub(crate) fn draw_svg(panels: &[Panel<'_>]) -> String {
        let rows = panels.len().div_ceil(PANEL_COLUMNS);
        if rows == 0 {
            return String::new();
        }
        let height = PANEL_HEIGHT * u32::try_from(rows).unwrap_or(u32::MAX);
        draw_svg((CHART_SIZE.0, height), |area| {
            for (area, panel) in area.split_evenly((rows, PANEL_COLUMNS)).iter().zip(panels) {
                let mut chart = ChartBuilder::on(area);
                chart
                    .caption(panel.title, FONT)
                    .margin(8)
                    .margin_right(24)
                    .x_label_area_size(42)
                    .y_label_area_size(130);
                draw_bars(&mut chart, &panel.bars, panel.unit)?;
            }
            Ok(())
        })
    }
}

/// Draws bars, one below the other. `name` labels the horizontal axis.
fn draw_bars(
    chart: &mut ChartBuilder<'_, '_, SVGBackend<'_>>,
    bars: &[Bar<'_>],
    name: &str,
) -> DrawResult {
    let highest = bars.iter().map(|bar| bar.spread.highest);
    let highest = highest.fold(0.0, f64::max) * 1.1;
    let titles: Vec<_> = bars.iter().map(|bar| bar.title).collect();
    let last = bars.len().saturating_sub(1);
    let mut chart = chart.build_cartesian_2d(0.0..highest, (0..last).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_labels(6)
        .x_max_light_lines(1)
        .x_desc(name)
        .x_label_formatter(&|x| {
            let decimals = usize::from(highest < 10.0);
            format!("{x:.decimals$}")
        })
        .y_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(at) => titles.get(*at).copied().unwrap_or("").to_owned(),
            SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
        })
        .label_style(FONT)
        .draw()?;
    chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
        let (low, high) = (SegmentValue::Exact(at), SegmentValue::Exact(at + 1));
        let corners = [(0.0, low), (bar.spread.median, high)];
        let mut area = Rectangle::new(corners, bar.color.filled());
        area.set_margin(6, 6, 0, 0);
        area
    }))?;
    chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
        let at = SegmentValue::CenterOf(at);
        let ends = [(bar.spread.lowest, at.clone()), (bar.spread.highest, at)];
        PathElement::new(ends, BLACK)
    }))?;
    Ok(())
}

impl Axis {
    fn to_position(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.max(0.1).log10(),
        }
    }

    fn label(self, place: f64) -> String {
        match self {
            Self::Linear => format!("{place:.0}"),
            Self::Logarithmic => format!("{:.0}", 10_f64.powf(place)),
        }
    }

    fn range(self, places: impl Iterator<Item = f64>) -> (f64, f64) {
        let (left, right) = min_and_max(places);
        let left = match self {
            Self::Linear => 0.0,
            Self::Logarithmic => left,
        };
        (left, right.max(left + 0.1))
    }

    fn point_size(self) -> u32 {
        match self {
            Self::Linear => 0,
            Self::Logarithmic => 2,
        }
    }

    fn legend_position(self) -> SeriesLabelPosition {
        match self {
            Self::Logarithmic => SeriesLabelPosition::LowerRight,
            // The curves leave this corner free, so the legend covers no point.
            Self::Linear => SeriesLabelPosition::UpperLeft,
        }
    }
}

fn draw_svg(
    size: (u32, u32),
    paint: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> DrawResult,
) -> String {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let painted = area.fill(&WHITE).map_err(Into::into);
    let painted = painted.and_then(|()| paint(&area));
    let painted = painted.and_then(|()| Ok(area.present()?));
    painted.expect("drawing into a string does not fail");
    drop(area);
    svg
}

fn min_and_max(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}
