//! The clients of both doors: each asks for one stream, and notes every token with the time at which
//! the read that brought it returned. They judge how a stream ends; what its tokens' order and times
//! mean is for others.

use std::error::Error;
use std::io;

use indicatif::ProgressBar;
use tokio::net::TcpStream;

mod grpc;
mod http;
mod lines;
mod timed;

pub(crate) use grpc::GrpcStreamingClient;
pub(crate) use http::HttpStreamingClient;
pub(crate) use timed::{ReadClock, TimedStream};

use crate::arguments::ServerUrl;
use crate::metrics::TokenSample;
use crate::order::index_of;
use crate::stamp::Stamp;

/// What is asked to be completed. The test runner's output does not depend on it.
const PROMPT: &str = "Count the tokens.";

/// A client that streams a completion through one door.
pub(crate) trait LlmStreamingClient {
    /// What its door is called.
    const DOOR: &'static str;

    /// Asks for a stream and reads it to its end into `received`.
    ///
    /// # Errors
    /// When the stream is not a whole one. `received` has the tokens that came until then.
    async fn stream(
        &self,
        request: &StreamRequest,
        received: &mut Received,
    ) -> Result<(), StreamError>;
}

/// What to ask for.
#[derive(Clone, Debug)]
pub(crate) struct StreamRequest {
    /// The model; `None` leaves it to the server.
    pub(crate) model: Option<String>,
    /// How many tokens.
    pub(crate) tokens: u32,
}

/// Why a stream is not a whole one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// Nobody answers.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// There is a connection, and no answer.
    #[error("no answer: {0}")]
    NoAnswer(String),
    /// The server will not.
    #[error("the server refused: {0}")]
    Refused(String),
    /// The answer has another form than the one that was asked for.
    #[error("the server answered with '{0}', and application/x-ndjson was asked for")]
    WrongForm(String),
    /// Something came that a stream does not have.
    #[error("after {after} tokens came what belongs to no stream: {what}")]
    Malformed {
        /// How many tokens were before it.
        after: usize,
        /// What it was.
        what: String,
    },
    /// A token came that is none of the test runner's.
    #[error("place {place} has the token {text:?}, and the test runner's are token_0, token_1, …")]
    ForeignToken {
        /// How many tokens were before it.
        place: usize,
        /// Its text.
        text: String,
    },
    /// The server ended the stream with an error.
    #[error("the stream ended with an error after {after} tokens: {message}")]
    ErrorRecord {
        /// How many tokens were before it.
        after: usize,
        /// What the server says.
        message: String,
    },
    /// The end is missing.
    #[error("the stream was cut off after {after} tokens: {missing}")]
    CutOff {
        /// How many tokens came.
        after: usize,
        /// What an end has, and this one has not.
        missing: String,
    },
    /// More tokens came than were asked for; the rest was not read.
    #[error("more than the {0} tokens came that were asked for")]
    TooMany(u32),
}

/// The tokens of a stream, as they come.
pub(crate) struct Received {
    expected: u32,
    /// When the request was sent.
    requested_ns: u64,
    samples: Vec<TokenSample>,
    progress: ProgressBar,
}

impl Received {
    /// Nothing yet of so many tokens.
    pub(crate) fn of(expected: u32, progress: ProgressBar) -> Self {
        Self {
            expected,
            requested_ns: 0,
            // Room for all, so that no token waits for a reallocation.
            samples: Vec::with_capacity(usize::try_from(expected).unwrap_or(0)),
            progress,
        }
    }

    /// When the request was sent, in nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn requested_ns(&self) -> u64 {
        self.requested_ns
    }

    /// The tokens that came, in the order in which they came.
    pub(crate) fn samples(&self) -> &[TokenSample] {
        &self.samples
    }

    fn count(&self) -> usize {
        self.samples.len()
    }

    fn requested_at(&mut self, requested_ns: u64) {
        self.requested_ns = requested_ns;
    }

    /// Takes a token, and returns the index that its text names.
    fn token(
        &mut self,
        text: &str,
        received_ns: u64,
        stamp: Option<Stamp>,
    ) -> Result<u32, StreamError> {
        let index = index_of(text).ok_or_else(|| StreamError::ForeignToken {
            place: self.count(),
            text: text.to_owned(),
        })?;
        self.samples.push(TokenSample {
            index,
            received_ns,
            stamp,
        });
        self.progress.inc(1);
        if u32::try_from(self.count()).is_ok_and(|count| count <= self.expected) {
            Ok(index)
        } else {
            Err(StreamError::TooMany(self.expected))
        }
    }

    fn malformed(&self, what: impl Into<String>) -> StreamError {
        StreamError::Malformed {
            after: self.count(),
            what: what.into(),
        }
    }

    fn error_record(&self, message: impl Into<String>) -> StreamError {
        StreamError::ErrorRecord {
            after: self.count(),
            message: message.into(),
        }
    }

    fn cut_off(&self, missing: impl Into<String>) -> StreamError {
        StreamError::CutOff {
            after: self.count(),
            missing: missing.into(),
        }
    }
}

/// Connects to a door. The clock tells when the connection was last read.
async fn connect(url: &ServerUrl) -> Result<(TimedStream, ReadClock), StreamError> {
    let connected = TcpStream::connect(&url.authority).await;
    let socket = connected.and_then(|socket| {
        socket.set_nodelay(true)?;
        Ok(socket)
    });
    let socket = socket.map_err(|source| StreamError::Connect {
        address: url.authority.clone(),
        source,
    })?;
    let clock = ReadClock::default();
    Ok((TimedStream::new(socket, clock.clone()), clock))
}

/// An error with all its causes: hyper's and tonic's own texts name only the outermost.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
