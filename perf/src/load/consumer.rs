//! Times and checks the tokens of one request's stream.

use super::Load;
use crate::fault::Fault;
use crate::load_stats::{LoadStats, RequestTimer};
use crate::order;
use crate::stream::Event;
use crate::timestamps::TokenTimestamps;

pub(crate) struct Consumer {
    pub(crate) progress: RequestTimer,
    expect_test_runner: bool,
    requested: u32,
    /// Indices of the tokens received so far. Empty if the tokens have no index.
    indices: Vec<u32>,
}

impl Consumer {
    /// Creates the consumer of a request of this load that is due at `due_ns`.
    pub(crate) fn start(due_ns: u64, load: &Load) -> Self {
        Self {
            progress: RequestTimer::start(due_ns, load.every_gap),
            expect_test_runner: load.expect_test_runner,
            requested: load.tokens,
            indices: Vec::new(),
        }
    }

    pub(crate) fn token_count(&self) -> u32 {
        self.progress.count
    }

    /// Consumes the next event.
    /// Returns the fault if the event is wrong. The caller must then stop reading.
    pub(crate) fn consume_event(
        &mut self,
        event: Event<'_>,
        received_ns: u64,
        stats: &mut LoadStats,
    ) -> Result<(), Fault> {
        match event {
            Event::Token(mut token) => {
                token.take_stamp_from_text();
                let index = if self.expect_test_runner {
                    Some(order::check_index(&token.text, token.index)?)
                } else {
                    token.index
                };
                stats.record_token_bytes(token.bytes);
                self.consume_token(index, token.stamp, received_ns, stats)
            }
            Event::BytesRead(bytes) => {
                stats.record_read(bytes);
                Ok(())
            }
            Event::Error(failure) => Err(Fault::Error {
                after: self.token_count(),
                message: failure.to_string(),
            }),
            Event::Started
            | Event::FinishReason
            | Event::EndOfStream
            | Event::Usage(_)
            | Event::Other => Ok(()),
        }
    }

    /// Consumes the next token. `index` is `None` if the server does not send the token's index.
    pub(crate) fn consume_token(
        &mut self,
        index: Option<u32>,
        stamp: Option<TokenTimestamps>,
        received_ns: u64,
        stats: &mut LoadStats,
    ) -> Result<(), Fault> {
        self.indices.extend(index);
        self.progress.record_token(stats, received_ns, stamp);
        if self.expect_test_runner && self.token_count() > self.requested {
            return Err(Fault::TooMany(self.requested));
        }
        Ok(())
    }

    pub(crate) fn record_end(&self, ended: Result<(), Fault>, stats: &mut LoadStats) {
        let expected = if self.expect_test_runner {
            self.requested
        } else {
            u32::try_from(self.indices.len()).unwrap_or(u32::MAX)
        };
        let faults = order::stream_faults(&self.indices, expected, ended);
        if faults.is_empty() {
            stats.record_request(&self.progress);
        }
        for fault in faults {
            stats.record_fault(fault.to_string());
        }
    }
}
