//! Fuzz target of the messages that a worker sends to the engine.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use metrics::Counter;
use prost::Message;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::remote_tokenizer::TokenizerCall;
use super::sequences::Sequences;
use super::tokenizer_calls::TokenizerCalls;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::question::Operation;
use crate::request::FinishReason;
use crate::runner::Sequence;
use crate::tokens::MIN_LOGPROB;
use crate::worker::token_channel::{Output, TokenReceiver, token_channel};
use crate::worker::wire::{self, SequenceId, Violation};
use crate::worker::{Assignment, AssignmentId};

const VOCABULARY_SIZE: u32 = 1_000;

/// Read-ahead of the readers, in tokens: less than their sequences have.
const CREDIT: usize = 4;

/// Ids that are asked for in the call of `detokenize`.
const DETOKENIZED_IDS: usize = 2;

/// Length-delimited `AttachRequest`s of one worker, which runs a plain sequence (number 1) and one that scores its
/// prompt (number 2), and has three open calls. Until the engine finds a violation, no reader gets more tokens than it
/// granted, an id outside the vocabulary, or an output after the end, and every answer matches its call.
pub(crate) fn worker_messages(mut messages: &[u8]) {
    let mut worker = Worker::new();
    while let Ok(proto::AttachRequest { message }) =
        proto::AttachRequest::decode_length_delimited(&mut messages)
    {
        let Some(message) = message else {
            continue;
        };
        if worker.handle_message(message).is_err() {
            return;
        }
        worker.check();
    }
}

/// The engine's state for one worker.
struct Worker {
    sequences: Sequences,
    readers: Vec<Reader>,
    calls: TokenizerCalls,
    answers: Vec<oneshot::Receiver<Answer>>,
}

/// A reader of a sequence, and its progress.
struct Reader {
    number: u64,
    channel: TokenReceiver,
    max_tokens: usize,
    /// Credit that the worker has been granted, and the tokens that it has used it for.
    granted: usize,
    received: usize,
    completion_tokens: usize,
    has_ended: bool,
}

impl Worker {
    fn new() -> Self {
        let mut sequences =
            Sequences::new(2, u64::MAX, SequenceId::default()).with_vocabulary(VOCABULARY_SIZE);
        let readers = [Sequence::new([0], 10), scoring_sequence()];
        let readers = readers.map(|sequence| Reader::submit(&mut sequences, sequence));
        let mut calls = TokenizerCalls::new(VOCABULARY_SIZE, 0, Duration::from_secs(30));
        let ids = vec![0; DETOKENIZED_IDS];
        let answers = [
            Operation::Tokenize(proto::Tokenize::default()),
            Operation::Detokenize(proto::Detokenize { ids }),
            Operation::RenderChat(proto::RenderChat::default()),
        ];
        let answers = answers.map(|operation| {
            let (answer, receiver) = oneshot::channel();
            calls.open(TokenizerCall { operation, answer });
            receiver
        });
        Self {
            sequences,
            readers: readers.into(),
            calls,
            answers: answers.into(),
        }
    }

    fn handle_message(&mut self, message: WorkerMessage) -> Result<(), Violation> {
        match message {
            WorkerMessage::Hello(hello) => {
                wire::check_name("hello.name", &hello.name)?;
                let timeout = wire::heartbeat_timeout(&hello)?;
                assert!(timeout.is_none_or(|timeout| timeout <= super::MAX_HEARTBEAT_TIMEOUT));
            }
            WorkerMessage::Ready(ready) => {
                let ready = wire::ready_report(ready, "model")?;
                assert!(ready.slots > 0 && ready.generation > 0);
                assert!(ready.facts.vocabulary_size > 0 && ready.facts.context_length >= 2);
            }
            WorkerMessage::LoadFailed(proto::LoadFailed { reason })
            | WorkerMessage::Crashed(proto::Crashed { reason }) => {
                assert!(!wire::sanitize(&reason).contains(char::is_control));
            }
            WorkerMessage::Accepted(accepted) => self.sequences.handle_accepted(accepted)?,
            WorkerMessage::Refused(refused) => self.sequences.handle_refused(refused),
            WorkerMessage::Step(step) => self.sequences.handle_step(step, 1)?,
            WorkerMessage::Answer(answer) => self.calls.close(answer)?,
            WorkerMessage::Loading(_) | WorkerMessage::Heartbeat(_) => {
                self.sequences.end_overdue_and_grant_credit(1)
            }
        }
        Ok(())
    }

    fn check(&mut self) {
        let effects = self.sequences.take_effects();
        for grant in effects.grants {
            let granted = self
                .readers
                .iter_mut()
                .find(|it| it.number == grant.sequence);
            let reader = granted.expect("only submitted sequences get credit");
            reader.granted += usize::try_from(grant.tokens).expect("a grant is a small number");
        }
        self.readers.iter_mut().for_each(Reader::read);
        for answer in &mut self.answers {
            match answer.try_recv() {
                Ok(Answer::Ids(ids)) => assert!(ids.ids.iter().all(|id| *id < VOCABULARY_SIZE)),
                Ok(Answer::Pieces(pieces)) => {
                    assert!(wire::token_bytes(&pieces, DETOKENIZED_IDS).is_some());
                }
                Ok(Answer::Text(_) | Answer::Failure(_)) | Err(_) => {}
            }
        }
    }
}

/// A sequence with all that a client may ask for.
fn scoring_sequence() -> Sequence {
    let mut sequence = Sequence::new([0, 1, 2], 6);
    sequence.scores_prompt = true;
    sequence.delivered = vec![3];
    sequence.options.logprobs = Some(1);
    sequence.options.stop_tokens.min_tokens = 3;
    sequence
}

impl Reader {
    fn submit(sequences: &mut Sequences, sequence: Sequence) -> Self {
        let (sender, channel) = token_channel(CREDIT, Arc::new(Notify::new()), Counter::noop());
        let remaining = usize::try_from(sequence.max_tokens).expect("a small number");
        let max_tokens = remaining - sequence.delivered.len();
        let assignment = Assignment {
            id: AssignmentId(0),
            sequence,
            token_channel: sender,
            deadline: Instant::now() + Duration::from_secs(3_600),
            prompt_blocks: Arc::default(),
            is_suspect: false,
        };
        let submit = sequences
            .submit(assignment)
            .expect("the sequence is runnable");
        Self {
            number: submit.sequence,
            channel,
            max_tokens,
            granted: usize::try_from(submit.credit).expect("at most the channel's credit"),
            received: 0,
            completion_tokens: 0,
            has_ended: false,
        }
    }

    fn read(&mut self) {
        let mut outputs = Vec::new();
        let context = &mut Context::from_waker(Waker::noop());
        if let Poll::Ready(0) | Poll::Pending =
            self.channel
                .poll_recv_many(context, &mut outputs, usize::MAX)
        {
            return;
        }
        for output in outputs {
            assert!(!self.has_ended, "{output:?} after the end");
            self.check(&output);
        }
        assert!(self.received <= self.granted, "{} tokens", self.received);
    }

    fn check(&mut self, output: &Output) {
        let tokens = output.completion_tokens();
        self.completion_tokens += tokens.len();
        self.received += tokens.len() + usize::from(matches!(output, Output::Prompt(_)));
        assert!(self.completion_tokens <= self.max_tokens);
        for token in tokens {
            assert!(token.id < VOCABULARY_SIZE);
            let logprob = token.logprobs.as_ref().and_then(|it| it.logprob);
            assert!(logprob.is_none_or(|logprob| (MIN_LOGPROB..0.01).contains(&logprob)));
        }
        match output {
            Output::Finished(_, FinishReason::Length) => {
                assert_eq!(self.completion_tokens, self.max_tokens);
                self.has_ended = true;
            }
            Output::Finished(_, FinishReason::Stop) | Output::Failed(_) => self.has_ended = true,
            Output::Accepted { .. } | Output::Prompt(_) | Output::Token(_) | Output::Tokens(_) => {}
        }
    }
}
