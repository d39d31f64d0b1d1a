//! The load generator: many streams at once, and a client that only reads, checks and times. It runs on
//! one thread, outside the server's process.
//!
//! The load is open loop: streams start when they are due, and the tokens of a paced stream arrive when
//! the device makes them, whatever the client does. Each is judged by the time at which it was due, so a
//! stall counts against everything that it delayed.

use std::time::Duration;

mod arrivals;
mod channel;
mod consumer;
mod counting;
mod grpc;
mod http;
mod lines;
mod messages;
mod response;
mod session;
#[cfg(test)]
mod tests;

pub(crate) use consumer::{Consumer, ReceivedToken};
pub(crate) use http::BodyFormat;
pub(crate) use session::{RequestOptions, Session, Sockets};

use crate::arguments::ServerUrl;
use crate::device::Device;

/// Work of one load.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Streams at once. If their starts are spread over longer than they last, they follow each other.
    pub(crate) streams: u32,
    /// Requests that each stream makes, one after the other.
    pub(crate) requests: u32,
    /// Tokens of each request.
    pub(crate) tokens: u32,
    /// Requests stamps, and records the tokens' times.
    pub(crate) timed: bool,
    /// Time over which the streams' starts are evenly spread.
    pub(crate) spread: Duration,
}

/// Destination of a load.
#[derive(Clone)]
pub(crate) enum Target {
    /// A device of this process, through its channels.
    Device(Device),
    /// An HTTP server.
    Http(ServerUrl, BodyFormat),
    /// A gRPC server.
    Grpc(ServerUrl),
}
