//! The times at which a token was due and emitted, as the server reports them on request.

use serde::Deserialize;

/// Separates the text of a scripted engine's token from its emission time.
pub(crate) const TEXT_STAMP: &str = "@";

/// Timestamps of one token, in nanoseconds of the server's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct TokenTimestamps {
    /// Time at which the token was due. `None` if the device has no schedule.
    pub(crate) due_ns: Option<u64>,
    pub(crate) emitted_ns: u64,
}
