//! The load generator: runs many concurrent streams, and checks and times each token. It runs on one thread, outside
//! the server's process.
//!
//! The load is open loop: streams start when they are due, and the tokens of a paced stream arrive when the device
//! makes them, whatever the client does. Each token is timed from its due time, so a stall counts against every token
//! that it delays.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

mod arrivals;
mod channel;
mod consumer;
mod generator;
mod http;
mod response;

pub(crate) use consumer::Consumer;
pub(crate) use generator::{ConnectionPlan, LoadGenerator};

use crate::arguments::ServerUrl;
use crate::device::Device;
use crate::stream::{CompletionRequest, Format, RequestInput, StreamOptions};

/// Description of one load.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Load {
    /// Number of streams. They run concurrently, unless `spread` is longer than a stream lasts.
    pub(crate) streams: u32,
    /// Number of requests that each stream makes, one after the other.
    pub(crate) requests: u32,
    /// Number of tokens that each request asks for.
    pub(crate) tokens: u32,
    /// True if requests ask for timestamps, from which one-way latency is computed.
    #[serde(skip)]
    pub(crate) request_timestamps: bool,
    /// True if gaps between tokens are recorded even if the tokens have no timestamps.
    #[serde(skip)]
    pub(crate) every_gap: bool,
    /// Time over which the starts of the streams are evenly spread.
    #[serde(skip)]
    pub(crate) spread: Duration,
    /// Text to complete. `None` for the default prompt.
    #[serde(skip)]
    pub(crate) prompt: Option<Arc<str>>,
    /// True if each stream must consist of `token_0`, `token_1`, … up to the requested number of tokens.
    pub(crate) expect_test_runner: bool,
    /// Model to request. `None` lets the server choose.
    pub(crate) model: Option<String>,
    /// Time limit of a request. `None` means no limit.
    #[serde(skip)]
    pub(crate) timeout: Option<Duration>,
}

/// Destination of a load.
#[derive(Clone)]
pub(crate) enum Target {
    /// A device in this process, whose token channels are read directly.
    Device(Device),
    Server(ServerUrl, Format),
}

impl Load {
    /// Returns a load of streams from the test runner, each with one request.
    pub(crate) fn of_test_runner(streams: u32, tokens: u32) -> Self {
        Self {
            streams,
            requests: 1,
            tokens,
            request_timestamps: false,
            every_gap: false,
            spread: Duration::ZERO,
            prompt: None,
            expect_test_runner: true,
            model: None,
            timeout: None,
        }
    }

    pub(crate) fn completion_request(&self) -> CompletionRequest<'_> {
        let default = CompletionRequest::of_tokens(self.tokens);
        let input = self.prompt.as_deref();
        let timestamps = StreamOptions::IncludeStamps(true);
        CompletionRequest {
            model: self.model.as_deref(),
            input: input.map_or(default.input, |prompt| RequestInput::Text { prompt }),
            stream_options: self.request_timestamps.then_some(timestamps),
            ..default
        }
    }
}
