//! What a server held over time, as SVG.

use plotters::prelude::*;

use crate::overhead::drawing::{Drawn, FONT, draw};

/// Width and height, in pixels.
const SIZE: (u32, u32) = (860, 300);

const COLORS: [RGBColor; 3] = [
    RGBColor(20, 90, 200),
    RGBColor(215, 95, 0),
    RGBColor(0, 130, 90),
];

/// A line of a chart: its name, and its values over the seconds of the run.
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) points: Vec<(f64, f64)>,
}

/// Values over time, from zero.
pub(super) fn over_time(curves: &[Curve], y_name: &str) -> Drawn {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let right = points().map(|(x, _)| *x).fold(0.1, f64::max);
    let high = points().map(|(_, y)| *y).fold(1.0, f64::max) * 1.05;
    draw(SIZE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(45)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..right, 0.0..high)?;
        chart
            .configure_mesh()
            .x_desc("seconds")
            .y_desc(y_name)
            .y_label_formatter(&|y| format!("{y:.0}"))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .label_style((FONT, 14))
            .draw()?;
        for (curve, color) in curves.iter().zip(COLORS) {
            let style = color.stroke_width(2);
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
                .label(curve.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 14))
            // There are no looks in the warm-up, so nothing is behind them here.
            .position(SeriesLabelPosition::UpperLeft)
            .draw()?;
        Ok(())
    })
}
