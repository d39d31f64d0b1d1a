//! A run on a terminal: rows over time, and the totals of each behavior at the end.

use super::sample::Sample;
use super::tally::{Kind, Tally};
use super::verdict::mib;
use crate::report::cell;

/// A column of the table over time.
type Column = (&'static str, fn(&Sample) -> String);

const COLUMNS: [Column; 9] = [
    ("time s", |sample| format!("{:.1}", sample.seconds)),
    ("RSS MiB", |sample| mib(sample.rss_bytes)),
    ("descriptors", |sample| sample.descriptors.to_string()),
    ("threads", |sample| sample.threads.to_string()),
    ("slots", |sample| sample.sequences.to_string()),
    ("queued", |sample| sample.queued.to_string()),
    ("connections", |sample| sample.connections.to_string()),
    ("streams done", |sample| sample.streams_done.to_string()),
    ("faults", |sample| sample.faults.to_string()),
];

/// Head of the table over time.
pub(super) fn head() -> String {
    COLUMNS.map(|(name, _)| cell(name)).concat()
}

/// A row of the table over time.
pub(super) fn row(sample: &Sample) -> String {
    COLUMNS.map(|(_, value)| cell(value(sample))).concat()
}

/// Number of starts of each behavior, and of its ends.
pub(super) fn totals(tally: &Tally) -> String {
    let lines = tally.kinds.iter().map(
        |Kind {
             kind,
             started,
             ends,
         }| {
            let ends = ends.iter().map(|(end, count)| format!("{end} {count}"));
            let ends = ends.collect::<Vec<_>>().join(", ");
            format!("  {:<20}{started:>8}   {ends}", kind.name())
        },
    );
    lines.collect::<Vec<_>>().join("\n")
}
