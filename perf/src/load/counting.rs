//! The consumer of streams by the test runner, whose tokens must be 0, 1, 2, … up to the requested number.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use super::consumer::{Consumer, ReceivedToken};
use super::lines::Lines;
use crate::fault::Fault;
use crate::figures::{Figures, Progress};

/// Consumer of one request's tokens.
pub(super) struct Counting {
    progress: Progress,
    lines: Lines,
    requested: u32,
}

impl Counting {
    /// Consumer for a request of this many tokens that is due at `due_ns`.
    pub(super) fn start(due_ns: u64, requested: u32) -> Self {
        Self {
            progress: Progress::start(due_ns),
            lines: Lines::default(),
            requested,
        }
    }

    fn all_arrived(&self) -> Result<(), Fault> {
        let after = self.count();
        match after.cmp(&self.requested) {
            Ordering::Equal => Ok(()),
            Ordering::Less => Err(Fault::cut_off(after, "its last token")),
            Ordering::Greater => Err(Fault::TooMany(self.requested)),
        }
    }
}

impl Consumer for Counting {
    fn token(&mut self, token: &ReceivedToken<'_>, figures: &mut Figures) -> Result<(), Fault> {
        let expected = self.progress.count;
        let wrong = |found| Err(Fault::Order { expected, found });
        if token.index != u64::from(expected) {
            return wrong(token.index.to_string());
        }
        if let Some(text) = token.text
            && !is_token(text, expected)
        {
            return wrong(String::from_utf8_lossy(text).into_owned());
        }
        self.progress.token(figures, token.received_ns, token.stamp);
        Ok(())
    }

    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault> {
        self.lines
            .read(piece, received_ns, &mut self.progress, figures)
    }

    /// Succeeds: the number of tokens shows if the stream is complete.
    fn body_ended(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn has_last(&self) -> bool {
        self.lines.has_finished()
    }

    fn count(&self) -> u32 {
        self.progress.count
    }

    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()> {
        match ended.and_then(|()| self.all_arrived()) {
            Ok(()) => {
                figures.finished(&self.progress);
                ControlFlow::Continue(())
            }
            Err(fault) => {
                figures.fault(fault.to_string());
                ControlFlow::Break(())
            }
        }
    }
}

/// Reports if this is the text of the test runner's token with this index.
fn is_token(text: &[u8], index: u32) -> bool {
    text.strip_prefix(b"token_")
        .is_some_and(|digits| digits == itoa::Buffer::new().format(index).as_bytes())
}
