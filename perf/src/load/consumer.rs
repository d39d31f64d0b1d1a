//! Consumers of responses. Every reader has one as a type parameter, so that no load pays for the checks
//! of another.

use std::ops::ControlFlow;

use crate::fault::Fault;
use crate::figures::Figures;
use crate::stamp::Stamp;

/// A token from a device, or over gRPC.
pub(crate) struct ReceivedToken<'a> {
    /// Index in its message, or its id.
    pub(crate) index: u64,
    /// `None` from a device, whose tokens are numbers.
    pub(crate) text: Option<&'a [u8]>,
    pub(crate) received_ns: u64,
    pub(crate) stamp: Option<Stamp>,
}

/// Consumer of the response to one request.
pub(crate) trait Consumer {
    /// Consumes the next token, from a device or over gRPC.
    ///
    /// # Errors
    /// If it is wrong, and reading must stop.
    fn token(&mut self, token: &ReceivedToken<'_>, figures: &mut Figures) -> Result<(), Fault>;

    /// Consumes the next piece of an HTTP body, or of a raw socket's stream.
    ///
    /// # Errors
    /// If it is wrong, and reading must stop.
    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault>;

    /// Handles the end of a body.
    ///
    /// # Errors
    /// If something is missing.
    fn body_ended(&self) -> Result<(), Fault>;

    /// Reports if the token with the finish reason has arrived.
    fn has_last(&self) -> bool;

    /// Number of tokens that have arrived.
    fn count(&self) -> u32;

    /// Records the result of the request. Breaks if its stream must make no other.
    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()>;
}
