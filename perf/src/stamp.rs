//! The times at which a token was due and emitted, as the server reports them on request.

use serde::Deserialize;

/// Times of one token, in nanoseconds of the server's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Stamp {
    /// Scheduled emission; only a device with a schedule has one.
    pub(crate) due_ns: Option<u64>,
    pub(crate) emitted_ns: u64,
}
