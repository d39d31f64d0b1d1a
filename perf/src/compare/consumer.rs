//! The consumer of one request's stream, from any server: its tokens with their times, and its end.

use std::ops::ControlFlow;

use crate::fault::Fault;
use crate::figures::{Figures, Progress};
use crate::load::{Consumer, ReceivedToken};
use crate::order;
use crate::stamp::Stamp;
use crate::stream::{Decoder, Event};

/// Tokens that a stream must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Any,
    TestRunner,
}

/// Consumer of one request's stream.
pub(super) struct Compared {
    tokens: Tokens,
    decoder: Decoder,
}

struct Tokens {
    progress: Progress,
    check: Check,
    requested: u32,
    /// Indices of the tokens, if they are known.
    indices: Vec<u32>,
}

impl Compared {
    /// Consumer for a request of this many tokens that is due at `due_ns`.
    pub(super) fn start(due_ns: u64, check: Check, requested: u32) -> Self {
        Self {
            tokens: Tokens {
                progress: Progress::start(due_ns).timing_every_gap(),
                check,
                requested,
                indices: Vec::new(),
            },
            decoder: Decoder::of_http(),
        }
    }
}

impl Tokens {
    /// Adds a token. `beside` is the index that gRPC sends beside the text.
    fn add(
        &mut self,
        text: &str,
        beside: Option<u32>,
        received: Received,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        let index = match self.check {
            Check::Any => beside,
            Check::TestRunner => Some(order::agreed_index(text, beside)?),
        };
        self.progress.token(figures, received.at_ns, received.stamp);
        self.indices.extend(index);
        if self.check == Check::TestRunner && self.progress.count > self.requested {
            return Err(Fault::TooMany(self.requested));
        }
        Ok(())
    }

    fn faults(&self, ended: Result<(), Fault>) -> Vec<Fault> {
        let received = u32::try_from(self.indices.len()).unwrap_or(u32::MAX);
        let expected = match self.check {
            Check::TestRunner => self.requested,
            Check::Any => received,
        };
        order::faults(&self.indices, expected, ended)
    }
}

/// Times of a token.
struct Received {
    at_ns: u64,
    stamp: Option<Stamp>,
}

impl Consumer for Compared {
    fn token(&mut self, token: &ReceivedToken<'_>, figures: &mut Figures) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(token.text.unwrap_or_default());
        let index = u32::try_from(token.index).unwrap_or(u32::MAX);
        let received = Received {
            at_ns: token.received_ns,
            stamp: token.stamp,
        };
        self.tokens.add(&text, Some(index), received, figures)
    }

    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault> {
        let Self { tokens, decoder } = self;
        decoder.read(piece, |event| match event {
            Event::Token(token) => {
                let received = Received {
                    at_ns: received_ns,
                    stamp: token.stamp,
                };
                tokens.add(&token.text, None, received, figures)
            }
            Event::Error(failure) => Err(Fault::Error {
                after: tokens.progress.count,
                message: failure.to_string(),
            }),
            Event::Started | Event::Finished | Event::Done | Event::Other => Ok(()),
        })
    }

    fn body_ended(&self) -> Result<(), Fault> {
        let after = self.count();
        match self.decoder.missing() {
            None => Ok(()),
            Some(missing) => Err(Fault::cut_off(after, missing)),
        }
    }

    fn has_last(&self) -> bool {
        self.decoder.has_finished()
    }

    fn count(&self) -> u32 {
        self.tokens.progress.count
    }

    /// A stream continues after a request that failed.
    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()> {
        let faults = self.tokens.faults(ended);
        if faults.is_empty() {
            figures.finished(&self.tokens.progress);
        }
        for fault in faults {
            figures.fault(fault.to_string());
        }
        ControlFlow::Continue(())
    }
}
