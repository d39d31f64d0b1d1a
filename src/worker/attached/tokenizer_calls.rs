//! The open tokenizer calls of one worker, and the check that an answer matches its call. `worker.proto` calls a
//! tokenizer call a `Question`.
//!
//! A call stays open after its caller has gone, because the worker is still working on it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::remote_tokenizer::TokenizerCall;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::question::Operation;
use crate::worker::wire::{self, Violation};

/// Maximum number of open calls per worker.
const MAX_OPEN_CALLS: usize = 32;

/// The tokenizer calls of one generation of a worker.
pub(super) struct TokenizerCalls {
    /// Open calls by number. Lower numbers are older.
    open: BTreeMap<u64, OpenCall>,
    last_number: u64,
    /// Number of tokens in the vocabulary. Valid token ids are lower.
    vocabulary_size: u32,
    /// A worker is unresponsive if it has open calls and has sent no answer for this long.
    unresponsive_timeout: Duration,
    /// Time of the latest answer, or start of this generation.
    last_answer: Instant,
}

struct OpenCall {
    expected: ExpectedAnswer,
    sent: Instant,
    answer: oneshot::Sender<Answer>,
}

/// The kind of answer that a call must get. A failure matches every call.
#[derive(Clone, Copy)]
enum ExpectedAnswer {
    Ids,
    /// The bytes of this number of tokens.
    Pieces(usize),
    Text,
}

impl TokenizerCalls {
    /// Creates an empty set of calls. The numbers continue after `last_number`, the last number of the previous
    /// generation. A late answer for that generation then matches no call of this one.
    pub(super) fn new(
        vocabulary_size: u32,
        last_number: u64,
        unresponsive_timeout: Duration,
    ) -> Self {
        Self {
            open: BTreeMap::new(),
            last_number,
            vocabulary_size,
            unresponsive_timeout,
            last_answer: Instant::now(),
        }
    }

    /// Number of the latest call.
    pub(super) fn last_number(&self) -> u64 {
        self.last_number
    }

    /// Returns true if another call may be opened.
    pub(super) fn has_room(&self) -> bool {
        self.open.len() < MAX_OPEN_CALLS
    }

    /// Returns the time at which the worker becomes unresponsive, or `None` if it has no open call.
    pub(super) fn unresponsive_at(&self) -> Option<Instant> {
        let oldest = self.open.values().next()?;
        Some(oldest.sent.max(self.last_answer) + self.unresponsive_timeout)
    }

    /// Opens a call. Returns the message to send to the worker.
    pub(super) fn open(&mut self, request: TokenizerCall) -> proto::Question {
        let TokenizerCall { operation, answer } = request;
        self.last_number += 1;
        let call = OpenCall {
            expected: ExpectedAnswer::of(&operation),
            sent: Instant::now(),
            answer,
        };
        self.open.insert(self.last_number, call);
        proto::Question {
            question: self.last_number,
            operation: Some(operation),
        }
    }

    /// Closes a call, and passes the answer to its caller. An answer is ignored if its call is not open or nobody
    /// waits for it.
    ///
    /// # Errors
    /// Returns an error if the answer does not match its call.
    pub(super) fn close(&mut self, answer: proto::Answer) -> Result<(), Violation> {
        let proto::Answer { question, answer } = answer;
        let Some(call) = self.open.remove(&question) else {
            return Ok(());
        };
        self.last_answer = Instant::now();
        if call.answer.is_closed() {
            return Ok(());
        }
        let answer = answer.filter(|answer| call.expected.matches(answer, self.vocabulary_size));
        let answer = answer.ok_or_else(|| {
            Violation(format!(
                "the answer to question {question} does not match the question"
            ))
        })?;
        // Sending fails if the caller has gone in the meantime.
        let _ = call.answer.send(answer);
        Ok(())
    }
}

impl ExpectedAnswer {
    fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Tokenize(_) | Operation::Infill(_) => Self::Ids,
            Operation::Detokenize(detokenize) => Self::Pieces(detokenize.ids.len()),
            Operation::RenderChat(_) => Self::Text,
        }
    }

    fn matches(self, answer: &Answer, vocabulary_size: u32) -> bool {
        match (self, answer) {
            (_, Answer::Failure(_)) | (Self::Text, Answer::Text(_)) => true,
            (Self::Ids, Answer::Ids(ids)) => ids.ids.iter().all(|id| *id < vocabulary_size),
            (Self::Pieces(count), Answer::Pieces(pieces)) => wire::has_pieces(pieces, count),
            (Self::Ids | Self::Pieces(_) | Self::Text, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::proto::v1;

    const UNRESPONSIVE_TIMEOUT: Duration = Duration::from_secs(30);

    fn calls() -> TokenizerCalls {
        TokenizerCalls::new(100, 0, UNRESPONSIVE_TIMEOUT)
    }

    fn tokenize() -> Operation {
        Operation::Tokenize(proto::Tokenize::default())
    }

    fn detokenize(ids: &[u32]) -> Operation {
        Operation::Detokenize(proto::Detokenize { ids: ids.to_vec() })
    }

    fn ids(ids: &[u32]) -> Option<Answer> {
        Some(Answer::Ids(v1::TokenIds { ids: ids.to_vec() }))
    }

    fn pieces(bytes: &[u8], lengths: &[u32]) -> Option<Answer> {
        Some(Answer::Pieces(proto::Pieces {
            bytes: bytes.to_vec(),
            lengths: lengths.to_vec(),
        }))
    }

    fn text() -> Option<Answer> {
        Some(Answer::Text(String::new()))
    }

    /// Opens a call and answers it. Returns the answer that the caller receives, or the violation.
    fn call_and_answer(
        operation: Operation,
        answer: Option<Answer>,
    ) -> Result<Option<Answer>, Violation> {
        let (mut calls, (sender, mut receiver)) = (calls(), oneshot::channel());
        let request = TokenizerCall {
            operation,
            answer: sender,
        };
        let question = calls.open(request).question;
        calls.close(proto::Answer { question, answer })?;
        Ok(receiver.try_recv().ok())
    }

    #[test]
    fn a_matching_answer_reaches_the_caller() {
        let render = || Operation::RenderChat(proto::RenderChat::default());
        let infill = || Operation::Infill(proto::Infill::default());
        let failure = || Some(Answer::Failure(proto::Failure::default()));
        for (operation, answer) in [
            (tokenize(), ids(&[0, 99])),
            (tokenize(), ids(&[])),
            (tokenize(), failure()),
            (infill(), ids(&[1])),
            (detokenize(&[5, 6]), pieces(b"abc", &[3, 0])),
            (detokenize(&[5]), failure()),
            (render(), text()),
            (render(), failure()),
        ] {
            assert_eq!(call_and_answer(operation, answer.clone()).unwrap(), answer);
        }
    }

    #[test]
    fn a_mismatched_answer_is_a_violation() {
        let render = || Operation::RenderChat(proto::RenderChat::default());
        for (operation, answer) in [
            (tokenize(), None),
            (tokenize(), text()),
            (tokenize(), pieces(b"", &[])),
            (tokenize(), ids(&[1, 100])),
            (detokenize(&[5]), ids(&[5])),
            (detokenize(&[5]), pieces(b"ab", &[1, 1])),
            (detokenize(&[5, 6]), pieces(b"ab", &[2])),
            (detokenize(&[5]), pieces(b"ab", &[1])),
            (detokenize(&[5]), pieces(b"ab", &[3])),
            (render(), ids(&[])),
        ] {
            let case = format!("{operation:?} {answer:?}");
            assert!(call_and_answer(operation, answer).is_err(), "{case}");
        }
    }

    #[test]
    fn an_answer_without_a_waiting_caller_is_ignored() {
        let mut calls = calls();
        let (answer, _) = oneshot::channel();
        let operation = tokenize();
        let question = calls.open(TokenizerCall { operation, answer }).question;
        for question in [question, question, 77] {
            let answer = text();
            let ignored = calls.close(proto::Answer { question, answer });
            ignored.unwrap();
        }
    }

    #[test]
    fn an_answer_for_an_earlier_generation_matches_no_call_of_the_next() {
        let open = |calls: &mut TokenizerCalls| {
            let (answer, receiver) = oneshot::channel();
            let operation = tokenize();
            (
                calls.open(TokenizerCall { operation, answer }).question,
                receiver,
            )
        };
        let mut before = calls();
        let (question, _receiver) = open(&mut before);
        let mut calls = TokenizerCalls::new(100, before.last_number(), UNRESPONSIVE_TIMEOUT);
        let (_, mut receiver) = open(&mut calls);
        let answer = ids(&[1]);
        let late = calls.close(proto::Answer { question, answer });
        late.unwrap();
        assert!(receiver.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_answers_no_call_for_too_long_is_unresponsive_even_without_waiting_callers()
     {
        let mut calls = calls();
        assert_eq!(calls.unresponsive_at(), None);
        let start = Instant::now();
        for _ in 0..MAX_OPEN_CALLS {
            assert!(calls.has_room());
            let (answer, _) = oneshot::channel();
            let operation = tokenize();
            calls.open(TokenizerCall { operation, answer });
            advance(Duration::from_secs(1)).await;
        }
        assert!(!calls.has_room());
        assert_eq!(calls.unresponsive_at(), Some(start + UNRESPONSIVE_TIMEOUT));
        let (question, answer) = (1, ids(&[]));
        let first = calls.close(proto::Answer { question, answer });
        first.unwrap();
        assert!(calls.has_room());
        assert_eq!(
            calls.unresponsive_at(),
            Some(Instant::now() + UNRESPONSIVE_TIMEOUT)
        );
    }
}
