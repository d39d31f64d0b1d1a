//! What a worker has been asked and has not answered: for how long, and whether its answer fits.
//!
//! A question stays open when nobody waits for it any more, for the worker still has it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::remote_tokenizer::TokenizerRequest;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::question::About;
use crate::worker::wire::{self, Violation};

/// How many questions a worker may have open at once.
const OPEN: usize = 32;

/// The questions of one life of a worker.
pub(super) struct TokenizerCalls {
    /// By number, so the first is the oldest.
    open: BTreeMap<u64, Open>,
    last: u64,
    /// Every id below this is a token.
    vocabulary_size: u32,
    /// How long the worker may leave its questions unanswered.
    unresponsive_timeout: Duration,
    /// When an answer came last, or this life began.
    heard: Instant,
}

struct Open {
    expected: Expected,
    asked: Instant,
    answer: oneshot::Sender<Answer>,
}

/// What answers a question, besides a failure.
#[derive(Clone, Copy)]
enum Expected {
    Ids,
    /// So many pieces.
    Pieces(usize),
    Text,
}

impl TokenizerCalls {
    /// None yet, to a worker with so many tokens; the last question of the life before had this number, so that an
    /// answer that crosses `ready` is to no question of this one.
    pub(super) fn new(vocabulary_size: u32, last: u64, unresponsive_timeout: Duration) -> Self {
        Self {
            open: BTreeMap::new(),
            last,
            vocabulary_size,
            unresponsive_timeout,
            heard: Instant::now(),
        }
    }

    /// The number of the last question.
    pub(super) fn last_number(&self) -> u64 {
        self.last
    }

    /// Whether the worker may be asked one more thing.
    pub(super) fn has_room(&self) -> bool {
        self.open.len() < OPEN
    }

    /// When the worker is mute: it has questions, and has answered none for too long.
    pub(super) fn due(&self) -> Option<Instant> {
        let oldest = self.open.values().next()?;
        Some(oldest.asked.max(self.heard) + self.unresponsive_timeout)
    }

    /// Opens a question.
    pub(super) fn ask(&mut self, asked: TokenizerRequest) -> proto::Question {
        let TokenizerRequest { about, answer } = asked;
        self.last += 1;
        let open = Open {
            expected: Expected::of(&about),
            asked: Instant::now(),
            answer,
        };
        self.open.insert(self.last, open);
        proto::Question {
            question: self.last,
            about: Some(about),
        }
    }

    /// Passes on an answer. One that nobody waits for is passed over.
    ///
    /// # Errors
    /// When it does not fit its question: then another worker may be asked.
    pub(super) fn answer(&mut self, answer: proto::Answer) -> Result<(), Violation> {
        let proto::Answer { question, answer } = answer;
        let Some(open) = self.open.remove(&question) else {
            return Ok(());
        };
        self.heard = Instant::now();
        if open.answer.is_closed() {
            return Ok(());
        }
        let answer = answer.filter(|answer| open.expected.fits(answer, self.vocabulary_size));
        let answer = answer.ok_or_else(|| {
            Violation(format!("the answer to question {question} does not fit it"))
        })?;
        // Whoever asked may have gone just now.
        let _ = open.answer.send(answer);
        Ok(())
    }
}

impl Expected {
    fn of(about: &About) -> Self {
        match about {
            About::Tokenize(_) | About::Infill(_) => Self::Ids,
            About::Detokenize(asked) => Self::Pieces(asked.ids.len()),
            About::RenderChat(_) => Self::Text,
        }
    }

    fn fits(self, answer: &Answer, vocabulary_size: u32) -> bool {
        match (self, answer) {
            (_, Answer::Failure(_)) | (Self::Text, Answer::Text(_)) => true,
            (Self::Ids, Answer::Ids(ids)) => ids.ids.iter().all(|id| *id < vocabulary_size),
            (Self::Pieces(count), Answer::Pieces(pieces)) => wire::are_pieces(pieces, count),
            (Self::Ids | Self::Pieces(_) | Self::Text, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const UNANSWERED_LIMIT: Duration = Duration::from_secs(30);

    fn questions() -> TokenizerCalls {
        TokenizerCalls::new(100, 0, UNANSWERED_LIMIT)
    }

    fn tokenize() -> About {
        About::Tokenize(proto::Tokenize::default())
    }

    fn detokenize(ids: &[u32]) -> About {
        About::Detokenize(proto::Detokenize { ids: ids.to_vec() })
    }

    fn ids(ids: &[u32]) -> Option<Answer> {
        Some(Answer::Ids(proto::TokenIds { ids: ids.to_vec() }))
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

    /// What becomes of this answer to this question: what reaches who asked, or which rule is broken.
    fn answered(about: About, answer: Option<Answer>) -> Result<Option<Answer>, Violation> {
        let (mut questions, (sender, mut receiver)) = (questions(), oneshot::channel());
        let asked = TokenizerRequest {
            about,
            answer: sender,
        };
        let question = questions.ask(asked).question;
        questions.answer(proto::Answer { question, answer })?;
        Ok(receiver.try_recv().ok())
    }

    #[test]
    fn a_matching_answer_reaches_the_caller() {
        let render = || About::RenderChat(proto::RenderChat::default());
        let infill = || About::Infill(proto::Infill::default());
        let failure = || Some(Answer::Failure(proto::Failure::default()));
        for (about, answer) in [
            (tokenize(), ids(&[0, 99])),
            (tokenize(), ids(&[])),
            (tokenize(), failure()),
            (infill(), ids(&[1])),
            (detokenize(&[5, 6]), pieces(b"abc", &[3, 0])),
            (detokenize(&[5]), failure()),
            (render(), text()),
            (render(), failure()),
        ] {
            assert_eq!(answered(about, answer.clone()).unwrap(), answer);
        }
    }

    #[test]
    fn a_mismatched_answer_is_a_violation() {
        let render = || About::RenderChat(proto::RenderChat::default());
        for (about, answer) in [
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
            let told = format!("{about:?} {answer:?}");
            assert!(answered(about, answer).is_err(), "{told}");
        }
    }

    #[test]
    fn an_answer_without_a_waiting_caller_is_ignored() {
        let mut questions = questions();
        let (answer, _) = oneshot::channel();
        let about = tokenize();
        let question = questions.ask(TokenizerRequest { about, answer }).question;
        for question in [question, question, 77] {
            let answer = text();
            let passed_over = questions.answer(proto::Answer { question, answer });
            passed_over.unwrap();
        }
    }

    #[test]
    fn an_answer_for_an_earlier_generation_matches_no_call_of_the_next() {
        let ask = |questions: &mut TokenizerCalls| {
            let (answer, answered) = oneshot::channel();
            let about = tokenize();
            (
                questions.ask(TokenizerRequest { about, answer }).question,
                answered,
            )
        };
        let mut before = questions();
        let (question, _answered) = ask(&mut before);
        let mut questions = TokenizerCalls::new(100, before.last_number(), UNANSWERED_LIMIT);
        let (_, mut answered) = ask(&mut questions);
        let answer = ids(&[1]);
        let late = questions.answer(proto::Answer { question, answer });
        late.unwrap();
        assert!(answered.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_answers_no_call_for_too_long_is_unresponsive_even_without_waiting_callers()
     {
        let mut questions = questions();
        assert_eq!(questions.due(), None);
        let began = Instant::now();
        for _ in 0..OPEN {
            assert!(questions.has_room());
            let (answer, _) = oneshot::channel();
            let about = tokenize();
            questions.ask(TokenizerRequest { about, answer });
            advance(Duration::from_secs(1)).await;
        }
        assert!(!questions.has_room());
        assert_eq!(questions.due(), Some(began + UNANSWERED_LIMIT));
        let (question, answer) = (1, ids(&[]));
        let first = questions.answer(proto::Answer { question, answer });
        first.unwrap();
        assert!(questions.has_room());
        assert_eq!(questions.due(), Some(Instant::now() + UNANSWERED_LIMIT));
    }
}
