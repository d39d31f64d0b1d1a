//! Faults of a request, which all clients of this program report.

use std::io;

use crate::order::OrderFault;

/// Reason why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("cannot connect to {address}: {why}")]
    Connect { address: String, why: io::Error },
    #[error("the connection broke: {0}")]
    Connection(String),
    #[error("the server refused: {0}")]
    Refused(String),
    #[error("expected {expected}, got {found}")]
    Unexpected { expected: String, found: String },
    #[error("expected token_{expected}, got {found}")]
    Order { expected: u32, found: String },
    #[error(transparent)]
    Tokens(#[from] OrderFault),
    #[error("the stream broke after {after} tokens: {cause}")]
    Broken { after: u32, cause: String },
    #[error("the stream ended after {after} tokens without {missing}")]
    CutOff { after: u32, missing: &'static str },
    #[error("the stream ended with an error after {after} tokens: {message}")]
    Error { after: u32, message: String },
    #[error("more than the requested {0} tokens arrived")]
    TooMany(u32),
    #[error("the stream hangs: {after} tokens arrived within {seconds} s")]
    Hangs { after: u32, seconds: u64 },
    #[error("not finished within {0} s")]
    TimedOut(u64),
    #[error("unexpected data: {0}")]
    Malformed(String),
    #[error("the server's process cannot be inspected: {0}")]
    Process(procfs::ProcError),
}

impl Fault {
    pub(crate) fn unexpected(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Unexpected {
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Returns a fault with all causes of an error, because hyper's own text names only the outermost cause.
    fn connection(error: impl Into<anyhow::Error>) -> Self {
        Self::Connection(format!("{:#}", error.into()))
    }

    /// Returns the fault of a stream that ended after this many tokens, before `missing` arrived.
    pub(crate) fn cut_off(after: u32, missing: &'static str) -> Self {
        Self::CutOff { after, missing }
    }

    /// Returns the fault of bytes that the protocol does not allow, shown as text.
    pub(crate) fn malformed(why: &str, bytes: &[u8]) -> Self {
        Self::Malformed(format!("{why}: {:?}", String::from_utf8_lossy(bytes)))
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::connection(error)
    }
}

impl From<hyper::Error> for Fault {
    fn from(error: hyper::Error) -> Self {
        Self::connection(error)
    }
}
