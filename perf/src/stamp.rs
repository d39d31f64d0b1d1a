//! The times at which a token was due and emitted, as the server reports them on request.

use serde::Deserialize;

/// Times of one token, in nanoseconds of the server's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Scheduled emission; only a device with a schedule has one.
    pub(crate) due_ns: Option<u64>,
    pub(crate) emitted_ns: u64,
}

/// The JSON object `stamp`, whose fields a foreign server may leave out.
#[derive(Deserialize)]
pub(crate) struct StampObject {
    due_ns: Option<u64>,
    emitted_ns: Option<u64>,
}

impl StampObject {
    /// Returns the stamp if the object has an emission time.
    pub(crate) fn into_stamp(self) -> Option<Stamp> {
        Some(Stamp {
            due_ns: self.due_ns,
            emitted_ns: self.emitted_ns?,
        })
    }
}
