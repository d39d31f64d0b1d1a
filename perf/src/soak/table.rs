//! A run on a terminal: rows over time, and the totals of each behavior at the end.

use super::sample::Sample;
use super::tally::{Kind, Tally};
use super::verdict::mib;
use crate::report::cell;

/// Head of the table over time.
pub(super) fn head() -> String {
    let columns = [
        "time s",
        "RSS MiB",
        "descriptors",
        "threads",
        "slots",
        "queued",
        "connections",
        "streams done",
        "faults",
    ];
    columns.map(cell).concat()
}

/// A row of the table over time.
pub(super) fn row(sample: &Sample) -> String {
    let (time, memory) = (format!("{:.1}", sample.seconds), mib(sample.rss_bytes));
    let counts = [
        sample.descriptors,
        sample.threads,
        sample.sequences,
        sample.queued,
        sample.connections,
        sample.streams_done,
        sample.faults,
    ];
    [time, memory].map(cell).concat() + &counts.map(cell).concat()
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
