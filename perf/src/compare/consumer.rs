//! The consumer of one request's stream, from any server: its tokens with their times, and its end.

use std::ops::ControlFlow;

use crate::fault::Fault;
use crate::figures::{Figures, Progress};
use crate::load::{Consumer, ReceivedToken};
use crate::order;
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
    /// Index of a token, if it is known. `beside` is the index that gRPC sends beside the text.
    fn index(&self, text: &str, beside: Option<u32>) -> Result<Option<u32>, Fault> {
        match self.check {
            Check::Any => Ok(beside),
            Check::TestRunner => order::agreed_index(text, beside).map(Some),
        }
    }

    /// Checks the number of tokens after one has been added.
    fn check_count(&self) -> Result<(), Fault> {
        match self.check {
            Check::TestRunner if self.progress.count > self.requested => {
                Err(Fault::TooMany(self.requested))
            }
            Check::TestRunner | Check::Any => Ok(()),
        }
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

impl Consumer for Compared {
    fn token(&mut self, token: &ReceivedToken<'_>, figures: &mut Figures) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(token.text.unwrap_or_default());
        let tokens = &mut self.tokens;
        let beside = u32::try_from(token.index).unwrap_or(u32::MAX);
        let index = tokens.index(&text, Some(beside))?;
        tokens.indices.extend(index);
        tokens
            .progress
            .token(figures, token.received_ns, token.stamp);
        tokens.check_count()
    }

    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault> {
        let Self { tokens, decoder } = self;
        decoder.read(piece, |event| match event {
            Event::Token(token) => {
                let index = tokens.index(&token.text, None)?;
                tokens.indices.extend(index);
                tokens.progress.token(figures, received_ns, token.stamp);
                tokens.check_count()
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
