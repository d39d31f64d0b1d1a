//! Prints a soak run: one row for each printed sample, and the totals of each behavior at the end.

use super::sample::Sample;
use super::tally::{BehaviorCounts, Tally};
use super::verdict::format_mib;
use crate::report::format_cell;

/// A column of the table of samples: its title, and the text of a sample.
type Column = (&'static str, fn(&Sample) -> String);

const COLUMNS: [Column; 10] = [
    ("time s", |sample| format!("{:.1}", sample.seconds)),
    ("RSS MiB", |sample| format_mib(sample.rss_bytes)),
    ("cache MiB", |sample| format_mib(sample.prefix_cache_bytes)),
    ("descriptors", |sample| sample.descriptors.to_string()),
    ("threads", |sample| sample.threads.to_string()),
    ("slots", |sample| sample.sequences.to_string()),
    ("queued", |sample| sample.queued.to_string()),
    ("connections", |sample| sample.connections.to_string()),
    ("streams done", |sample| sample.streams_done.to_string()),
    ("faults", |sample| sample.faults.to_string()),
];

pub(super) fn sample_head() -> String {
    COLUMNS.map(|(name, _)| format_cell(name)).concat()
}

pub(super) fn sample_row(sample: &Sample) -> String {
    COLUMNS
        .map(|(_, value)| format_cell(value(sample)))
        .concat()
}

/// Formats, for each behavior, the number of its starts and of its different ends.
pub(super) fn behavior_totals(tally: &Tally) -> String {
    let lines = tally.kinds.iter().map(
        |BehaviorCounts {
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
