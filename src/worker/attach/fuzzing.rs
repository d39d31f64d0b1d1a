//! Fuzz target of the messages that an engine sends to a worker.

use std::cell::LazyCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use prost::Message;
use tokio::sync::{Notify, mpsc};
use tokio_stream::Stream;

use super::engine_connection::{EngineConnection, call_model};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use crate::runner::{Loader, Model, Token, TokenBytes};
use crate::worker::outbox::{OutboundMessages, Outbox};
use crate::worker::token_channel::SendOutcome;
use crate::worker::wire::{self, SequenceId};
use crate::worker::{Assignment, Flags, Generation, WakeTarget, WorkerHandle, WorkerWaker};

/// Most tokens that the device emits between two messages.
const TOKENS_PER_TURN: usize = 8;

thread_local! {
    static MODEL: LazyCell<Arc<dyn Model>> = const {
        LazyCell::new(|| {
            let loader = TestRunnerLoader::new(TestRunnerOptions::default());
            loader.load(1, &|_| ()).expect("the test model loads").model
        })
    };
}

/// Length-delimited `AttachResponse`s. Between them the device emits tokens for every sequence that has credit. No
/// sequence emits more tokens than it was granted, none after it was cancelled, and every token is sent once.
pub(crate) fn engine_messages(mut messages: &[u8]) {
    let mut worker = Worker::new();
    while let Ok(proto::AttachResponse { message }) =
        proto::AttachResponse::decode_length_delimited(&mut messages)
    {
        if let Some(message) = message
            && worker.handle_message(message).is_err()
        {
            break;
        }
        worker.running.iter_mut().for_each(Running::emit);
    }
    worker.check_outbox();
}

/// The worker's side of one connection.
struct Worker {
    connection: EngineConnection,
    outbox: Arc<Outbox>,
    running: Vec<Running>,
}

/// A sequence of the device.
struct Running {
    number: u64,
    assignment: Assignment,
    granted: u64,
    emitted: u64,
    /// The engine can still grant credit to it.
    is_known: bool,
}

impl Worker {
    fn new() -> Self {
        let (commands, _) = mpsc::channel(1);
        let waker = WorkerWaker {
            flags: Arc::<Flags>::default(),
            target: WakeTarget::Task(Arc::<Notify>::default()),
        };
        let outbox = Arc::<Outbox>::default();
        let handle = WorkerHandle { commands, waker };
        let connection = EngineConnection::new(&handle, Arc::clone(&outbox));
        MODEL.with(|model| connection.start_generation(Generation(1), model));
        Self {
            connection,
            outbox,
            running: Vec::new(),
        }
    }

    fn handle_message(&mut self, message: EngineMessage) -> Result<(), String> {
        match message {
            EngineMessage::Submit(submit) => self.submit(submit)?,
            EngineMessage::Credit(proto::Credit { grants }) => {
                self.connection.grant(&grants);
                for grant in grants {
                    for running in self.running.iter_mut().filter(|it| it.is(grant.sequence)) {
                        running.granted += u64::from(grant.tokens);
                    }
                }
            }
            EngineMessage::Cancel(proto::Cancel { sequences }) => {
                self.connection.cancel(&sequences);
                for number in sequences {
                    for running in self.running.iter_mut().filter(|it| it.is(number)) {
                        running.is_known = false;
                        assert!(running.assignment.token_channel.is_closed());
                    }
                }
            }
            EngineMessage::Question(proto::Question {
                operation: Some(operation),
                ..
            }) => {
                let answer = MODEL.with(|model| call_model(&***model, operation));
                let answer = Some(answer);
                proto::Answer {
                    question: 1,
                    answer,
                }
                .encode_to_vec();
            }
            EngineMessage::Question(_) | EngineMessage::Welcome(_) | EngineMessage::Drain(_) => {}
        }
        Ok(())
    }

    fn submit(&mut self, submit: proto::Submit) -> Result<(), String> {
        let (number, credit) = (submit.sequence, submit.credit);
        let Some(submission) = self.connection.register_submission(submit)? else {
            return Ok(());
        };
        let sequence = &submission.assignment.sequence;
        assert!(!sequence.prompt.is_empty() && credit > 0);
        let id = SequenceId {
            number,
            generation: 1,
        };
        let again = wire::sequence_from_submit(wire::submit_message(sequence, id, credit));
        assert_eq!(again.as_ref().ok(), Some(sequence));
        // The engine never repeats a number. If it does, it knows only the latest sequence.
        for running in self.running.iter_mut().filter(|it| it.is(number)) {
            running.is_known = false;
        }
        self.running.push(Running {
            number,
            assignment: submission.assignment,
            granted: credit.into(),
            emitted: 0,
            is_known: true,
        });
        Ok(())
    }

    /// Reads all messages to the engine, and compares their tokens with those that were emitted.
    fn check_outbox(self) {
        let mut messages = OutboundMessages::new(&self.outbox);
        let context = &mut Context::from_waker(Waker::noop());
        let mut sent = 0;
        while let Poll::Ready(Some(message)) = Pin::new(&mut messages).poll_next(context) {
            let encoded = message.encode_to_vec();
            assert_eq!(
                proto::AttachRequest::decode(&*encoded).as_ref(),
                Ok(&message)
            );
            if let Some(WorkerMessage::Step(step)) = message.message {
                let tokens = step.sequences.iter().map(|entry| entry.ids.len());
                sent += tokens.sum::<usize>();
            }
        }
        let emitted = self.running.iter().map(|running| running.emitted);
        assert_eq!(u64::try_from(sent), Ok(emitted.sum()));
    }
}

impl Running {
    fn is(&self, number: u64) -> bool {
        self.is_known && self.number == number
    }

    fn emit(&mut self) {
        let channel = &self.assignment.token_channel;
        for _ in 0..channel.credit().min(TOKENS_PER_TURN) {
            let token = Token {
                id: 1,
                bytes: TokenBytes::from_slice(b"x"),
                due_ns: 0,
                emitted_ns: 0,
                logprobs: None,
            };
            match channel.send_token(token) {
                SendOutcome::Delivered => self.emitted += 1,
                SendOutcome::Closed => return,
                SendOutcome::NoCredit => panic!("the channel has credit"),
            }
        }
        assert!(self.emitted <= self.granted);
    }
}
