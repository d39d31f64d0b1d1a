//! The load generator: many streams at once, and a client that only reads, checks and times. It runs on
//! one thread, outside the server's process.
//!
//! The load is open loop: streams start when they are due, and the tokens of a paced stream arrive when
//! the device makes them, whatever the client does. Each is judged by the time at which it was due, so a
//! stall counts against everything that it delayed.

use std::time::Duration;

use serde::Serialize;

mod arrivals;
mod channel;
mod consumer;
mod http;
mod response;
mod session;

pub(crate) use consumer::Consumer;
pub(crate) use session::{Session, Sockets};

use crate::arguments::ServerUrl;
use crate::device::Device;
use crate::stream::{CompletionRequest, Format};

/// Work of one load.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Load {
    /// Streams at once. If their starts are spread over longer than they last, they follow each other.
    pub(crate) streams: u32,
    /// Requests that each stream makes, one after the other.
    pub(crate) requests: u32,
    /// Tokens of each request.
    pub(crate) tokens: u32,
    /// Requests stamps, and records the tokens' times.
    #[serde(skip)]
    pub(crate) timed: bool,
    /// Records the gaps between tokens without stamps too.
    #[serde(skip)]
    pub(crate) every_gap: bool,
    /// Time over which the streams' starts are evenly spread.
    #[serde(skip)]
    pub(crate) spread: Duration,
    /// Checks that each stream is `token_0`, `token_1`, … up to the requested number.
    pub(crate) expect_test_runner: bool,
    /// `None` lets the server choose.
    pub(crate) model: Option<String>,
    /// Time limit of a request. `None` waits forever.
    #[serde(skip)]
    pub(crate) timeout: Option<Duration>,
}

/// Destination of a load.
#[derive(Clone)]
pub(crate) enum Target {
    /// A device of this process, through its channels.
    Device(Device),
    Server(ServerUrl, Format),
}

impl Load {
    /// Streams of the test runner, each of which makes one request.
    pub(crate) fn of_test_runner(streams: u32, tokens: u32) -> Self {
        Self {
            streams,
            requests: 1,
            tokens,
            timed: false,
            every_gap: false,
            spread: Duration::ZERO,
            expect_test_runner: true,
            model: None,
            timeout: None,
        }
    }

    /// Request of each stream.
    pub(crate) fn completion(&self) -> CompletionRequest<'_> {
        CompletionRequest {
            model: self.model.as_deref(),
            stamps: self.timed,
            ..CompletionRequest::of_tokens(self.tokens)
        }
    }
}
