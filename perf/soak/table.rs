//! A run on a terminal: a row now and then while it lasts, and the totals of each kind at its end.

use super::kind::Kind;
use super::sample::Sample;
use super::tally::Tally;
use super::verdict::mib;

/// The head of the table over time.
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
    columns.map(|name| format!("{name:>14}")).concat()
}

/// One row of it.
pub(super) fn row(sample: &Sample) -> String {
    let columns = [
        format!("{:.1}", sample.seconds),
        mib(sample.rss_bytes),
        sample.descriptors.to_string(),
        sample.threads.to_string(),
        sample.sequences.to_string(),
        sample.queued.to_string(),
        sample.connections.to_string(),
        sample.streams_done.to_string(),
        sample.faults.to_string(),
    ];
    columns.map(|value| format!("{value:>14}")).concat()
}

/// How often each kind ran, and how it ended.
pub(super) fn totals(tally: &Tally) -> String {
    let lines = Kind::ALL.map(|kind| {
        let ends = tally.ends(kind).into_iter();
        let ends: Vec<_> = ends.map(|(end, count)| format!("{end} {count}")).collect();
        let (title, begun) = (kind.title(), tally.begun(kind));
        format!("  {title:<36}{begun:>8}   {}", ends.join(", "))
    });
    lines.join("\n")
}
