//! What one request has seen of its stream: its tokens with their times, and whether it had its end.
//! It knows nothing of how a stream comes.

use std::ops::ControlFlow;

use super::completion::{Completion, Meaning};
use super::records::{Record, Records};
use super::{Asked, Check};
use crate::load::{Came, Fault, Figures, Progress, Taker};
use crate::order::{self, OrderFault};
use crate::stamp::Stamp;

/// One request's stream, as it comes.
pub(super) struct Seen {
    progress: Progress,
    check: Check,
    /// How many tokens were asked for.
    asked: u32,
    /// The tokens' indices, where they are known.
    indices: Vec<u32>,
    records: Records,
    completion: Completion,
    has_finished: bool,
    is_done: bool,
}

impl Seen {
    /// Nothing yet of a request that is due at that time.
    pub(super) fn begin(due_ns: u64, asked: &Asked) -> Self {
        Self {
            progress: Progress::begin(due_ns).timing_every_gap(),
            check: asked.check,
            asked: asked.load.tokens,
            indices: Vec::new(),
            records: Records::default(),
            completion: Completion::default(),
            has_finished: false,
            is_done: false,
        }
    }

    /// What is wrong with a stream that ended so. What is missing because it broke is not lost on the
    /// way.
    fn faults(&self, ended: Result<(), Fault>) -> Vec<Fault> {
        let received = u32::try_from(self.indices.len()).unwrap_or(u32::MAX);
        let expected = match self.check {
            Check::TestRunner => self.asked,
            Check::Any => received,
        };
        match (order::check(&self.indices, expected), ended) {
            (Ok(()), Ok(())) => vec![],
            (Err(order), Ok(()) | Err(Fault::TooMany(_))) => vec![order.into()],
            (Ok(()) | Err(OrderFault::LostAtEnd { .. }), Err(ended)) => vec![ended],
            (Err(order), Err(ended)) => vec![order.into(), ended],
        }
    }

    fn record(
        &mut self,
        record: Record<'_>,
        received_ns: u64,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        if self.is_done {
            return Err(Fault::Malformed("a record after [DONE]".to_owned()));
        }
        let object = match record {
            Record::Object(object) => object,
            Record::Error(data) => return Err(self.error(String::from_utf8_lossy(data).into())),
            Record::Done => {
                self.is_done = true;
                return Ok(());
            }
        };
        match self.completion.read(object)? {
            Meaning::Token {
                text,
                stamp,
                is_last,
            } => {
                if self.has_finished {
                    return Err(Fault::Malformed("a token after the last".to_owned()));
                }
                self.has_finished = is_last;
                let index = self.index_in(&text)?;
                self.token(index, received_ns, stamp, figures)
            }
            Meaning::End => {
                self.has_finished = true;
                Ok(())
            }
            Meaning::Error(message) => Err(self.error(message)),
            Meaning::Other => Ok(()),
        }
    }

    /// The index that a token's text must name; `None` of any text.
    fn index_in(&self, text: &str) -> Result<Option<u32>, Fault> {
        match self.check {
            Check::Any => Ok(None),
            Check::TestRunner => order::index_of(text).map(Some).ok_or_else(|| {
                Fault::Malformed(format!(
                    "the token {text:?}, which is not the test runner's"
                ))
            }),
        }
    }

    fn token(
        &mut self,
        index: Option<u32>,
        received_ns: u64,
        stamp: Option<Stamp>,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        self.progress.token(figures, received_ns, stamp);
        self.indices.extend(index);
        if self.check == Check::TestRunner && self.count() > self.asked {
            return Err(Fault::TooMany(self.asked));
        }
        Ok(())
    }

    fn error(&self, message: String) -> Fault {
        let after = self.count();
        Fault::Error { after, message }
    }
}

impl Taker for Seen {
    /// Over gRPC every token has its index beside it, whatever its text is.
    fn take(&mut self, token: &Came<'_>, figures: &mut Figures) -> Result<(), Fault> {
        let text = String::from_utf8_lossy(token.text.unwrap_or_default());
        let index = u32::try_from(token.index).unwrap_or(u32::MAX);
        match self.index_in(&text)? {
            Some(named) if named != index => {
                let what = format!("the token {text:?} under the index {index}");
                Err(Fault::Malformed(what))
            }
            Some(_) | None => self.token(Some(index), token.received_ns, token.stamp, figures),
        }
    }

    fn body(&mut self, piece: &[u8], received_ns: u64, figures: &mut Figures) -> Result<(), Fault> {
        let mut records = std::mem::take(&mut self.records);
        let read = records.read(piece, |record| self.record(record, received_ns, figures));
        self.records = records;
        read
    }

    fn body_ended(&self) -> Result<(), Fault> {
        let missing = if self.records.is_within_one() {
            "the end of its last record"
        } else if !self.has_finished {
            "a finish_reason"
        } else if self.records.are_events() && !self.is_done {
            "[DONE]"
        } else {
            return Ok(());
        };
        let after = self.count();
        Err(Fault::NoEnd { after, missing })
    }

    fn has_last(&self) -> bool {
        self.has_finished
    }

    fn count(&self) -> u32 {
        self.progress.next_index
    }

    /// A stream goes on after a request that failed.
    fn ended(&self, ended: Result<(), Fault>, figures: &mut Figures) -> ControlFlow<()> {
        let faults = self.faults(ended);
        if faults.is_empty() {
            figures.finished(&self.progress);
        }
        for fault in faults {
            figures.fault(fault.to_string());
        }
        ControlFlow::Continue(())
    }
}
