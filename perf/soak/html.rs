//! A run as one HTML page that needs nothing from elsewhere.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::charts::{self, Curve};
use super::outcome::Outcome;
use super::sample::Sample;
use super::table;
use crate::overhead::drawing::ChartError;
use crate::overhead::page::{escaped, figure, whole};

const INTRODUCTION: &str = "
<p>A server was put under a mixed load for a while: whole streams on both doors, every token of them
checked; streams that were left in the middle; readers that stood still; requests that were none. Below is
what its process held over time under that load. When all clients had left it had to hold what it held
before, and no more.</p>";

/// Writes the page.
pub(super) fn write(path: &Path, outcome: &Outcome) -> io::Result<()> {
    let page = page(outcome).map_err(io::Error::other)?;
    fs::write(path, page)
}

fn page(outcome: &Outcome) -> Result<String, ChartError> {
    let mut body = INTRODUCTION.to_owned();
    for line in outcome.verdict() {
        let class = if outcome.is_good() { "pass" } else { "fail" };
        // Writing to a string never fails.
        let _ = write!(body, "<p class=\"{class}\">{}</p>", escaped(&line));
    }
    let steady = &outcome.steady;
    let curve = |name, unit, value: fn(&Sample) -> u64| Curve {
        name,
        points: steady
            .iter()
            .map(|sample| (sample.seconds, number(value(sample)) / unit))
            .collect(),
    };
    let memory = [curve("RSS", 1024.0, |sample| sample.rss_bytes / 1024)];
    let caption = "Resident memory. It may rise while an allocator learns how much is needed, and then \
                   must stay.";
    figure(&mut body, &charts::over_time(&memory, "MiB")?, caption);
    let held = [
        curve("descriptors", 1.0, |sample| sample.descriptors),
        curve("connections", 1.0, |sample| sample.connections),
        curve("threads", 1.0, |sample| sample.threads),
    ];
    let caption = "Descriptors, the connections among them, and threads.";
    figure(&mut body, &charts::over_time(&held, "how many")?, caption);
    let requests = [
        curve("requests in flight", 1.0, |sample| sample.in_flight),
        curve("slots taken", 1.0, |sample| sample.sequences),
        curve("queued", 1.0, |sample| sample.queued),
    ];
    let caption =
        "Requests in flight, those of them that have a slot of the device, and those that wait.";
    figure(
        &mut body,
        &charts::over_time(&requests, "how many")?,
        caption,
    );
    let totals = escaped(&table::totals(&outcome.tally));
    let (head, rows) = (
        table::head(),
        [&outcome.before, &outcome.after].map(table::row),
    );
    let rows = escaped(&rows.join("\n"));
    let _ = write!(
        body,
        "<h2>What clients did</h2><pre>{totals}</pre>\
         <h2>Without clients: before the load, and after it</h2><pre>{head}\n{rows}</pre>"
    );
    Ok(whole("A server under load for a while", &body))
}

/// A count on a chart's axis.
fn number(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
