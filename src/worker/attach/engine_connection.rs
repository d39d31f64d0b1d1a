//! One connection to an engine: handles the engine's messages. Sequences go to the device thread. Tokenizer calls are
//! answered on blocking threads.
//!
//! This module must not know how the connection is established.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use crate::proto::v1;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::proto::worker::question::Operation;
use crate::request::{ChatMessage, MAX_TIMEOUT};
use crate::runner::{BosPolicy, Model};
use crate::worker::outbox::{Outbox, RemoteChannel, RemoteReader};
use crate::worker::token_channel::TokenSender;
use crate::worker::{Assignment, AssignmentId, Generation, Submission, WorkerHandle, wire};

/// Maximum number of tokenizer calls that are answered at the same time. Further calls are rejected.
const MAX_OPEN_CALLS: usize = 64;

/// Reason why a connection to the engine ended.
pub(super) enum ConnectionEnd {
    /// The engine has drained the worker, or the device thread has ended.
    Drained,
    /// The connection broke, or could not be established.
    Broken(Status),
}

/// One connection to an engine, and the sequences that the engine has submitted on it.
pub(super) struct EngineConnection {
    handle: WorkerHandle,
    pub(super) outbox: Arc<Outbox>,
    state: Mutex<State>,
}

/// A loaded model, and the worker's generation that loaded it.
struct GenerationModel {
    generation: Generation,
    model: Arc<dyn Model>,
}

#[derive(Default)]
struct State {
    /// The loaded model and its generation, as reported to the engine. `None` while the engine must not submit
    /// sequences.
    loaded: Option<GenerationModel>,
    /// The engine's reader of each sequence. The key is the sequence's number.
    readers: HashMap<u64, Arc<RemoteReader>>,
}

impl EngineConnection {
    pub(super) fn new(handle: &WorkerHandle, outbox: Arc<Outbox>) -> Self {
        Self {
            handle: handle.clone(),
            outbox,
            state: Mutex::default(),
        }
    }

    /// Starts to accept sequences for this generation of the worker.
    pub(super) fn start_generation(&self, generation: Generation, model: &Arc<dyn Model>) {
        self.state().loaded = Some(GenerationModel {
            generation,
            model: Arc::clone(model),
        });
    }

    /// Cancels all sequences. Accepts no more until the next generation starts.
    pub(super) fn cancel_all(&self) {
        let mut state = self.state();
        state.loaded = None;
        for (_, reader) in state.readers.drain() {
            reader.cancel();
        }
        drop(state);
        self.handle.wake();
    }

    /// Handles the engine's messages until the stream ends.
    pub(super) async fn handle_messages(
        &self,
        inbound: &mut Streaming<proto::AttachResponse>,
    ) -> ConnectionEnd {
        let mut open_calls = JoinSet::new();
        let mut is_draining = false;
        loop {
            let message = match inbound.message().await {
                Ok(Some(message)) => message.message,
                Ok(None) if is_draining => return ConnectionEnd::Drained,
                Ok(None) => {
                    return ConnectionEnd::Broken(Status::unavailable(
                        "the engine ended the stream",
                    ));
                }
                Err(status) => return ConnectionEnd::Broken(status),
            };
            match message {
                Some(EngineMessage::Submit(submit)) => match self.register_submission(submit) {
                    Ok(Some(submission)) => self.handle.submit_waiting(submission).await,
                    Ok(None) => {}
                    Err(violation) => {
                        return ConnectionEnd::Broken(Status::failed_precondition(violation));
                    }
                },
                Some(EngineMessage::Credit(proto::Credit { grants })) => self.grant(&grants),
                Some(EngineMessage::Cancel(proto::Cancel { sequences })) => self.cancel(&sequences),
                Some(EngineMessage::Question(question)) => {
                    while open_calls.try_join_next().is_some() {}
                    self.answer_call(question, &mut open_calls);
                }
                Some(EngineMessage::Drain(proto::Drain {})) => {
                    is_draining = true;
                    self.handle.drain();
                }
                // A message of a later protocol version.
                Some(EngineMessage::Welcome(_)) | None => {}
            }
        }
    }

    /// Converts the engine's submission to a sequence. Returns `None` if it belongs to an earlier generation.
    pub(super) fn register_submission(
        &self,
        submit: proto::Submit,
    ) -> Result<Option<Submission>, String> {
        let (number, generation) = (submit.sequence, Generation(submit.generation));
        let credit = usize::try_from(submit.credit).unwrap_or(usize::MAX);
        let sequence =
            wire::sequence_from_submit(submit).map_err(|violation| violation.to_string())?;
        let reader = RemoteReader::new(credit);
        let mut state = self.state();
        // The engine sent this submission before it received the worker's `crashed` message. The engine already
        // counts the sequence as lost.
        let current = state.loaded.as_ref().map(|loaded| loaded.generation);
        if current != Some(generation) {
            return Ok(None);
        }
        state.readers.retain(|_, reader| !reader.has_ended());
        state.readers.insert(number, Arc::clone(&reader));
        drop(state);
        let channel = RemoteChannel::new(
            number,
            reader,
            Arc::clone(&self.outbox),
            sequence.delivered.len(),
            sequence.options.timestamps,
        );
        let assignment = Assignment {
            // The engine identifies a sequence by its number, and never sees this id.
            id: AssignmentId(number),
            sequence,
            token_channel: TokenSender::remote(channel),
            deadline: Instant::now() + MAX_TIMEOUT,
            prompt_blocks: Arc::default(),
            is_suspect: false,
        };
        Ok(Some(Submission {
            generation,
            assignment,
        }))
    }

    pub(super) fn grant(&self, grants: &[proto::Grant]) {
        let state = self.state();
        for grant in grants {
            if let Some(reader) = state.readers.get(&grant.sequence) {
                reader.grant(usize::try_from(grant.tokens).unwrap_or(usize::MAX));
            }
        }
        drop(state);
        self.handle.wake();
    }

    pub(super) fn cancel(&self, sequences: &[u64]) {
        let mut state = self.state();
        for sequence in sequences {
            if let Some(reader) = state.readers.remove(sequence) {
                reader.cancel();
            }
        }
        drop(state);
        self.handle.wake();
    }

    /// Answers a tokenizer call on a blocking thread.
    fn answer_call(&self, question: proto::Question, open_calls: &mut JoinSet<()>) {
        let proto::Question {
            question,
            operation,
        } = question;
        let model = self
            .state()
            .loaded
            .as_ref()
            .map(|loaded| Arc::clone(&loaded.model));
        let outbox = Arc::clone(&self.outbox);
        let is_full = open_calls.len() >= MAX_OPEN_CALLS;
        open_calls.spawn(async move {
            let answer = match (model, operation) {
                (Some(model), Some(operation)) if !is_full => {
                    let answer =
                        tokio::task::spawn_blocking(move || call_model(&*model, operation));
                    answer
                        .await
                        .unwrap_or_else(|_| failed_answer("the tokenizer panicked"))
                }
                (Some(_) | None, _) => {
                    failed_answer("the worker has no loaded model or too many open tokenizer calls")
                }
            };
            let answer = Some(answer);
            outbox.send(WorkerMessage::Answer(proto::Answer { question, answer }));
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn call_model(model: &dyn Model, operation: Operation) -> Answer {
    let answered = match operation {
        Operation::Tokenize(proto::Tokenize { text, begins }) => {
            let bos = if begins {
                BosPolicy::Add
            } else {
                BosPolicy::Omit
            };
            let ids = model.tokenize(&text, bos);
            ids.map(|ids| Answer::Ids(v1::TokenIds { ids }))
        }
        Operation::Infill(proto::Infill { prefix, suffix }) => {
            let ids = model.tokenize_infill(&prefix, &suffix);
            ids.map(|ids| Answer::Ids(v1::TokenIds { ids }))
        }
        Operation::Detokenize(proto::Detokenize { ids }) => {
            let pieces = model.token_bytes(&ids);
            pieces.map(|token_bytes| Answer::Pieces(wire::pieces_message(&token_bytes)))
        }
        Operation::RenderChat(proto::RenderChat { messages }) => {
            let message = |message: v1::ChatMessage| ChatMessage {
                role: message.role,
                content: message.content,
                name: Some(message.name).filter(|name| !name.is_empty()),
            };
            let messages: Vec<_> = messages.into_iter().map(message).collect();
            model.render_chat(&messages).map(Answer::Text)
        }
    };
    answered.unwrap_or_else(|error| Answer::Failure(wire::model_failure_message(&error)))
}

fn failed_answer(reason: &str) -> Answer {
    Answer::Failure(proto::Failure {
        is_invalid: false,
        message: reason.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use tokio::sync::{Notify, mpsc};

    use super::*;
    use crate::runner::Loader as _;
    use crate::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
    use crate::worker::wire::SequenceId;
    use crate::worker::{Flags, WakeTarget, WorkerWaker};

    fn submit(number: u64) -> proto::Submit {
        let (assignment, _) = Assignment::for_test(1, Instant::now());
        wire::submit_message(
            &assignment.sequence,
            SequenceId {
                number,
                generation: 1,
            },
            1,
        )
    }

    #[tokio::test]
    async fn a_cancelled_sequence_makes_room_for_the_next_submission() {
        let (commands, mut device) = mpsc::channel(1);
        let waker = WorkerWaker {
            flags: Arc::<Flags>::default(),
            target: WakeTarget::Task(Arc::<Notify>::default()),
        };
        let connection = EngineConnection::new(&WorkerHandle { commands, waker }, Arc::default());
        let loader = TestRunnerLoader::new(TestRunnerOptions::default());
        let loaded = loader.load(1, &|_| ()).expect("the test model loads");
        connection.start_generation(Generation(1), &loaded.model);
        let first = connection.register_submission(submit(1)).unwrap().unwrap();
        connection.handle.submit_waiting(first).await;
        connection.cancel(&[1]);
        let second = connection.register_submission(submit(2)).unwrap().unwrap();
        let mut second = pin!(connection.handle.submit_waiting(second));
        poll_fn(|cx| {
            assert!(second.as_mut().poll(cx).is_pending(), "the queue is full");
            Poll::Ready(())
        })
        .await;
        let cancelled = device.recv().await.unwrap().assignment;
        assert!(cancelled.token_channel.is_closed());
        second.await;
        let next = device.recv().await.unwrap().assignment;
        assert!(!next.token_channel.is_closed());
    }
}
