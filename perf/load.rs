//! The load: many streams at once through one door, with a client that does nothing but read, check
//! and time. It is one thread, and no part of the server's process.
//!
//! The load is open loop: streams begin when they are due and a paced stream's tokens come when the
//! device makes them, whatever the client does. Each is judged by when it was due, so that a stall counts
//! against all that it delayed.

use std::time::Duration;

mod answer;
mod arrivals;
mod channel;
mod counted;
mod figures;
mod grpc;
mod http;
mod lines;
mod message;
mod session;
mod taker;
#[cfg(test)]
mod tests;

pub(crate) use figures::{Figures, Progress, Times};
pub(crate) use http::Form;
pub(crate) use session::{Session, Sockets, Terms};
pub(crate) use taker::{Came, Taker};

use crate::arguments::ServerUrl;
use crate::device::Device;
use crate::order::OrderFault;

/// What is asked of a door.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// How many streams run at once, or come one after the other where their beginnings are spread over
    /// longer than they last.
    pub(crate) streams: u32,
    /// How many requests each of them makes, one after the other.
    pub(crate) requests: u32,
    /// How many tokens each request asks for.
    pub(crate) tokens: u32,
    /// Whether tokens carry their stamps, and their times are taken.
    pub(crate) timed: bool,
    /// Over how long the streams' beginnings are spread, evenly.
    pub(crate) spread: Duration,
}

/// Why a stream is no good.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Http2(#[from] h2::Error),
    #[error("the server answered {0}")]
    Refused(String),
    #[error("token_{expected} was due, and {found} came")]
    Order { expected: u32, found: String },
    #[error("{0}")]
    Tokens(#[from] OrderFault),
    #[error("the stream ended after {0} tokens without its end")]
    CutOff(u32),
    #[error("the stream ended after {after} tokens without {missing}")]
    NoEnd { after: u32, missing: &'static str },
    #[error("the stream ended with an error after {after} tokens: {message}")]
    Error { after: u32, message: String },
    #[error("more than the {0} tokens came that were asked for")]
    TooMany(u32),
    #[error("the stream hangs: {after} tokens came within {seconds} s")]
    Hangs { after: u32, seconds: u64 },
    #[error("the stream has what belongs to none: {0}")]
    Malformed(String),
}

/// Where the load goes.
#[derive(Clone)]
pub(crate) enum Target {
    /// A device of this process, by its channels.
    Device(Device),
    /// A server's HTTP door, or its floor.
    Http(ServerUrl, Form),
    /// A server's gRPC door, or its floor.
    Grpc(ServerUrl),
}
