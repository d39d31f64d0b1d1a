//! What takes the answers to a load's requests. Everything that reads has it as a type parameter, so that
//! no load pays for another's checks.

use std::ops::ControlFlow;

use super::Fault;
use super::figures::Figures;
use crate::stamp::Stamp;

/// A token as it came from a device, or over gRPC.
pub(crate) struct Came<'a> {
    /// Its index, by its message or its number.
    pub(crate) index: u64,
    /// `None` from a device, whose tokens are numbers.
    pub(crate) text: Option<&'a [u8]>,
    pub(crate) received_ns: u64,
    pub(crate) stamp: Option<Stamp>,
}

/// What takes the answer to one request, and knows what is wrong with it.
pub(crate) trait Taker {
    /// Takes the next token, from a device or over gRPC.
    ///
    /// # Errors
    /// When it is wrong, and no other should be read.
    fn take(&mut self, token: &Came<'_>, figures: &mut Figures) -> Result<(), Fault>;

    /// Takes the next piece of a body over HTTP, or over a bare socket.
    ///
    /// # Errors
    /// When it is wrong, and no other should be read.
    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault>;

    /// Takes the end of a body.
    ///
    /// # Errors
    /// When something is missing.
    fn body_ended(&self) -> Result<(), Fault>;

    /// Whether a token has come that says that it is the last.
    fn has_last(&self) -> bool;

    /// How many tokens have come.
    fn count(&self) -> u32;

    /// Notes what the request came to; breaks where its stream is to make no other.
    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()>;
}
