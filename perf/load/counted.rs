//! An answer of a floor or of the product, whose tokens must be the test runner's: 0, 1, 2 … to as many as
//! were asked for.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use super::Fault;
use super::figures::{Figures, Progress};
use super::lines::Lines;
use super::taker::{Came, Taker};

/// One request's tokens, as they come.
pub(super) struct Counted {
    progress: Progress,
    lines: Lines,
    /// How many tokens were asked for.
    asked: u32,
}

impl Counted {
    /// Nothing yet of a request for so many tokens that is due at that time.
    pub(super) fn begin(due_ns: u64, asked: u32) -> Self {
        Self {
            progress: Progress::begin(due_ns),
            lines: Lines::default(),
            asked,
        }
    }

    fn all_came(&self) -> Result<(), Fault> {
        let count = self.count();
        match count.cmp(&self.asked) {
            Ordering::Equal => Ok(()),
            Ordering::Less => Err(Fault::CutOff(count)),
            Ordering::Greater => Err(Fault::TooMany(self.asked)),
        }
    }
}

impl Taker for Counted {
    fn take(&mut self, token: &Came<'_>, figures: &mut Figures) -> Result<(), Fault> {
        let expected = self.progress.next_index;
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

    /// The number of its tokens says whether it is whole.
    fn body_ended(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn has_last(&self) -> bool {
        self.lines.has_finished()
    }

    fn count(&self) -> u32 {
        self.progress.next_index
    }

    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()> {
        match ended.and_then(|()| self.all_came()) {
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

/// Whether this is the text of the test runner's token with this index.
fn is_token(text: &[u8], index: u32) -> bool {
    text.strip_prefix(b"token_")
        .is_some_and(|digits| digits == itoa::Buffer::new().format(index).as_bytes())
}
