//! A comparison as a page, in the look of all reports.

use std::fs;
use std::io;
use std::path::Path;

use plotters::style::RGBColor;

use super::Asked;
use super::results::Measured;
use super::table::{self, STAMPED, TIMES, Time};
use crate::overhead::drawing::{
    Axis, Bar, ChartError, Curve, Drawn, draw_bars, draw_curves, quantiles,
};
use crate::overhead::machine::Machine;
use crate::overhead::page::{escaped, figure, stamp, whole};

const INTRODUCTION: &str = "
<p>The same load was put on each of these servers by the same client on the same machine, and they took turns
round by round: compare them with each other, not with another machine's figures. The client is one thread
that reads, checks and times, and notes when each read returned. A record of a stream counts as one token. Of
servers whose tokens do not say when they were made only what the client sees can be told: a delay that is the
same for all tokens is in the time to the first of them and in no other figure.</p>";

/// Told apart by eye, also by those who see fewer colors.
const COLORS: [RGBColor; 6] = [
    RGBColor(20, 90, 200),
    RGBColor(215, 95, 0),
    RGBColor(0, 130, 90),
    RGBColor(160, 40, 120),
    RGBColor(110, 110, 110),
    RGBColor(90, 170, 220),
];

/// Writes the page.
pub(super) fn write(
    path: &Path,
    machine: &Machine,
    servers: &[Measured],
    asked: &Asked,
) -> io::Result<()> {
    let page = page(machine, servers, asked).map_err(io::Error::other)?;
    fs::write(path, page)
}

fn page(machine: &Machine, servers: &[Measured], asked: &Asked) -> Result<String, ChartError> {
    let mut body = String::from(INTRODUCTION);
    body.push_str(&stamp(machine));
    let title = escaped(&asked.title());
    body.extend(["<h2>", &title, "</h2>"]);
    figure(&mut body, &throughput(servers)?, "Longer is better.");
    for time in TIMES.iter().chain(&STAMPED) {
        let (name, definition, _) = time;
        let caption = format!("{name}: {definition}. Left is better.");
        figure(&mut body, &curves(servers, time)?, &caption);
    }
    body.push_str("<h2>All figures</h2><pre>");
    body.push_str(&escaped(&table::text(servers, asked)));
    for server in servers {
        for fault in &server.faults {
            body.push_str(&escaped(&format!(
                "\nFAULT {}, {fault}",
                server.server.name
            )));
        }
    }
    body.push_str("</pre>");
    Ok(whole("Servers compared", &body))
}

fn colored(servers: &[Measured]) -> impl Iterator<Item = (&Measured, RGBColor)> {
    servers.iter().zip(COLORS.iter().copied().cycle())
}

fn throughput(servers: &[Measured]) -> Drawn {
    let bars = colored(servers).filter_map(|(server, color)| {
        Some(Bar {
            title: &server.server.name,
            color,
            spread: server.spread(|round| round.tokens_per_second)?,
        })
    });
    draw_bars(&bars.collect::<Vec<_>>(), "tokens per second")
}

fn curves(servers: &[Measured], (name, _, of): &Time) -> Drawn {
    let curves = colored(servers).filter_map(|(server, color)| {
        let times = of(&server.times);
        (!times.is_empty()).then(|| Curve {
            title: &server.server.name,
            color,
            points: quantiles(times),
        })
    });
    let name = format!("{name}, µs (logarithmic)");
    let share = "values within it, %";
    draw_curves(&curves.collect::<Vec<_>>(), &name, share, Axis::Logarithmic)
}
