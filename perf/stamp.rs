//! When a token left its device, as the server says it on request.

use serde::Deserialize;

/// When a token left its device, in nanoseconds of the server's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// When it was to be emitted, from devices that keep a schedule.
    pub(crate) due_ns: Option<u64>,
    /// When it was emitted.
    pub(crate) emitted_ns: u64,
}

/// The stamp as JSON, of servers that may not have one.
#[derive(Deserialize)]
pub(crate) struct StampObject {
    due_ns: Option<u64>,
    emitted_ns: Option<u64>,
}

impl StampObject {
    /// The stamp, if it says when the token was emitted.
    pub(crate) fn into_stamp(self) -> Option<Stamp> {
        Some(Stamp {
            due_ns: self.due_ns,
            emitted_ns: self.emitted_ns?,
        })
    }
}
