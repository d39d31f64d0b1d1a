//! A run on a terminal: rows over time, and the totals of each behavior at the end.

use super::behavior::Behavior;
use super::sample::Sample;
use super::tally::Tally;
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
    let lines = Behavior::all().iter().map(|&behavior| {
        let ends = tally.ends(behavior).into_iter();
        let ends: Vec<_> = ends.map(|(end, count)| format!("{end} {count}")).collect();
        let (title, started) = (behavior.title(), tally.started(behavior));
        format!("  {title:<36}{started:>8}   {}", ends.join(", "))
    });
    lines.collect::<Vec<_>>().join("\n")
}
