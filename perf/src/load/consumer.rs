//! The consumer of one request's stream: it times and checks the tokens.

use super::Load;
use crate::fault::Fault;
use crate::figures::{Figures, Progress};
use crate::order;
use crate::stamp::Stamp;
use crate::stream::Event;

pub(crate) struct Consumer {
    pub(crate) progress: Progress,
    expect_test_runner: bool,
    requested: u32,
    /// Indices of the tokens, if they are known.
    indices: Vec<u32>,
}

impl Consumer {
    /// Consumer for a request of this load that is due at `due_ns`.
    pub(crate) fn start(due_ns: u64, load: &Load) -> Self {
        Self {
            progress: Progress::start(due_ns, load.every_gap),
            expect_test_runner: load.expect_test_runner,
            requested: load.tokens,
            indices: Vec::new(),
        }
    }

    /// Number of tokens that have arrived.
    pub(crate) fn count(&self) -> u32 {
        self.progress.count
    }

    /// Consumes the next event.
    ///
    /// # Errors
    /// If it is wrong, and reading must stop.
    pub(crate) fn event(
        &mut self,
        event: Event<'_>,
        received_ns: u64,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        match event {
            Event::Token(token) => {
                let index = if self.expect_test_runner {
                    Some(order::agreed_index(&token.text, token.index)?)
                } else {
                    token.index
                };
                figures.token_bytes(token.bytes);
                self.token(index, token.stamp, received_ns, figures)
            }
            Event::Piece(bytes) => {
                figures.read(bytes);
                Ok(())
            }
            Event::Error(failure) => Err(Fault::Error {
                after: self.count(),
                message: failure.to_string(),
            }),
            Event::Started | Event::Finished | Event::Done | Event::Other => Ok(()),
        }
    }

    /// Consumes the next token. Its index is `None` if it is unknown.
    pub(crate) fn token(
        &mut self,
        index: Option<u32>,
        stamp: Option<Stamp>,
        received_ns: u64,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        self.indices.extend(index);
        self.progress.token(figures, received_ns, stamp);
        if self.expect_test_runner && self.count() > self.requested {
            return Err(Fault::TooMany(self.requested));
        }
        Ok(())
    }

    /// Records the result of the request.
    pub(crate) fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) {
        let expected = if self.expect_test_runner {
            self.requested
        } else {
            u32::try_from(self.indices.len()).unwrap_or(u32::MAX)
        };
        let faults = order::faults(&self.indices, expected, ended);
        if faults.is_empty() {
            figures.finished(&self.progress);
        }
        for fault in faults {
            figures.fault(fault.to_string());
        }
    }
}
