//! What an engine says to a worker on one connection: sequences for the device's thread, and questions, which are
//! answered on threads that may wait. It must not know how the engine is reached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::End;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::attach_request::Message as Said;
use crate::proto::worker::attach_response::Message;
use crate::proto::worker::question::About;
use crate::request::{ChatMessage, MAX_TIMEOUT};
use crate::runner::{BosPolicy, Model};
use crate::worker::outbox::{Outbox, RemoteChannel, RemoteReader};
use crate::worker::token_channel::TokenSender;
use crate::worker::{Assignment, Generation, WorkerHandle, wire};

/// How many questions may be open at once; the next is refused.
const QUESTIONS: usize = 64;

/// What one connection has brought: the sequences that its engine has submitted.
pub(super) struct EngineConnection {
    handle: WorkerHandle,
    pub(super) outbox: Arc<Outbox>,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    /// The life that the engine submits to, and its model.
    life: Option<(Generation, Arc<dyn Model>)>,
    readers: HashMap<u64, Arc<RemoteReader>>,
}

impl EngineConnection {
    pub(super) fn new(handle: &WorkerHandle, outbox: Arc<Outbox>) -> Self {
        Self {
            handle: handle.clone(),
            outbox,
            running: Mutex::default(),
        }
    }

    /// The engine is told that a life has begun.
    pub(super) fn begin(&self, life: Generation, model: &Arc<dyn Model>) {
        self.running().life = Some((life, Arc::clone(model)));
    }

    /// Nobody waits for anything any more.
    pub(super) fn cancel_all(&self) {
        let mut running = self.running();
        running.life = None;
        for (_, reader) in running.readers.drain() {
            reader.cancel();
        }
        drop(running);
        self.handle.attend();
    }

    /// Does what the engine says, until the stream ends.
    pub(super) async fn read(&self, inbound: &mut Streaming<proto::AttachResponse>) -> End {
        let mut answering = JoinSet::new();
        let mut is_draining = false;
        loop {
            let message = match inbound.message().await {
                Ok(Some(message)) => message.message,
                Ok(None) if is_draining => return End::Drained,
                Ok(None) => return End::Broken(Status::unavailable("the engine ended the stream")),
                Err(status) => return End::Broken(status),
            };
            match message {
                Some(Message::Submit(submit)) => match self.taken(submit) {
                    Ok(Some((life, assignment))) => {
                        self.handle.submit_when_room(life, assignment).await;
                    }
                    Ok(None) => {}
                    Err(rule) => return End::Broken(Status::failed_precondition(rule)),
                },
                Some(Message::Credit(proto::Credit { grants })) => self.grant(&grants),
                Some(Message::Cancel(proto::Cancel { sequences })) => self.cancel(&sequences),
                Some(Message::Question(question)) => {
                    while answering.try_join_next().is_some() {}
                    self.answer(question, &mut answering);
                }
                Some(Message::Drain(proto::Drain {})) => {
                    is_draining = true;
                    self.handle.drain();
                }
                // A message that is newer than this worker.
                Some(Message::Welcome(_)) | None => {}
            }
        }
    }

    /// What the device is to run; nothing where the life is over that it was meant for.
    fn taken(&self, submit: proto::Submit) -> Result<Option<(Generation, Assignment)>, String> {
        let (number, of) = (submit.sequence, Generation(submit.life));
        let credit = usize::try_from(submit.credit).unwrap_or(usize::MAX);
        let sequence = wire::sequence(submit).map_err(|violation| violation.to_string())?;
        let reader = RemoteReader::new(credit);
        let mut running = self.running();
        // It crosses the word that the model is gone: the engine counts it as lost.
        let life = running.life.as_ref().map(|(life, _)| *life);
        let Some(life) = life.filter(|life| *life == of) else {
            return Ok(None);
        };
        running.readers.retain(|_, reader| !reader.has_ended());
        running.readers.insert(number, Arc::clone(&reader));
        drop(running);
        let token_channel = RemoteChannel::new(
            (number, reader),
            Arc::clone(&self.outbox),
            sequence.delivered.len(),
            sequence.timestamps,
        );
        let assignment = Assignment {
            sequence,
            token_channel: TokenSender::elsewhere(token_channel),
            deadline: Instant::now() + MAX_TIMEOUT,
            is_suspect: false,
        };
        Ok(Some((life, assignment)))
    }

    fn grant(&self, grants: &[proto::Grant]) {
        let running = self.running();
        for grant in grants {
            if let Some(reader) = running.readers.get(&grant.sequence) {
                reader.grant(usize::try_from(grant.tokens).unwrap_or(usize::MAX));
            }
        }
        drop(running);
        self.handle.attend();
    }

    fn cancel(&self, sequences: &[u64]) {
        let mut running = self.running();
        for sequence in sequences {
            if let Some(reader) = running.readers.remove(sequence) {
                reader.cancel();
            }
        }
        drop(running);
        self.handle.attend();
    }

    /// Asks the model on a thread that may wait.
    fn answer(&self, question: proto::Question, answering: &mut JoinSet<()>) {
        let proto::Question { question, about } = question;
        let model = self
            .running()
            .life
            .as_ref()
            .map(|(_, model)| Arc::clone(model));
        let outbox = Arc::clone(&self.outbox);
        let is_full = answering.len() >= QUESTIONS;
        answering.spawn(async move {
            let answer = match (model, about) {
                (Some(model), Some(about)) if !is_full => {
                    let asked = tokio::task::spawn_blocking(move || answer(&*model, about));
                    asked
                        .await
                        .unwrap_or_else(|_| no_answer("the tokenizer panicked"))
                }
                (Some(_) | None, _) => no_answer("the worker cannot say"),
            };
            let answer = Some(answer);
            outbox.say(Said::Answer(proto::Answer { question, answer }));
        });
    }

    /// Held for a look or a change.
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(model: &dyn Model, about: About) -> Answer {
    let answered = match about {
        About::Tokenize(proto::Tokenize { text, begins }) => {
            let beginning = if begins {
                BosPolicy::Add
            } else {
                BosPolicy::Omit
            };
            let ids = model.tokenize(&text, beginning);
            ids.map(|ids| Answer::Ids(proto::TokenIds { ids }))
        }
        About::Infill(proto::Infill { prefix, suffix }) => {
            let ids = model.infill(&prefix, &suffix);
            ids.map(|ids| Answer::Ids(proto::TokenIds { ids }))
        }
        About::Detokenize(proto::Detokenize { ids }) => {
            let pieces = model.pieces(&ids);
            pieces.map(|pieces| Answer::Pieces(wire::pieces(&pieces)))
        }
        About::RenderChat(proto::RenderChat { messages }) => {
            let message = |message: proto::ChatMessage| ChatMessage {
                role: message.role,
                content: message.content,
                name: Some(message.name).filter(|name| !name.is_empty()),
            };
            let messages: Vec<_> = messages.into_iter().map(message).collect();
            model.render_chat(&messages).map(Answer::Text)
        }
    };
    answered.unwrap_or_else(|error| Answer::Failure(wire::of_model(&error)))
}

fn no_answer(why: &str) -> Answer {
    Answer::Failure(proto::Failure {
        is_invalid: false,
        message: why.to_owned(),
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
    use crate::worker::{Flags, Wake, WakeTarget};

    fn submit(number: u64) -> proto::Submit {
        let (assignment, _) = Assignment::for_test(1, Instant::now());
        wire::submit(&assignment.sequence, SequenceId { number, life: 1 }, 1)
    }

    #[tokio::test]
    async fn a_cancelled_sequence_makes_room_for_the_next_submission() {
        let (commands, mut device) = mpsc::channel(1);
        let wake = Wake {
            flags: Arc::<Flags>::default(),
            sleeper: WakeTarget::Task(Arc::<Notify>::default()),
        };
        let reading = EngineConnection::new(&WorkerHandle { commands, wake }, Arc::default());
        let loader = TestRunnerLoader::new(TestRunnerOptions::default());
        let loaded = loader.load(1, &|_| ()).expect("it loads");
        reading.begin(Generation(1), &loaded.model);
        let (life, first) = reading.taken(submit(1)).unwrap().unwrap();
        reading.handle.submit_when_room(life, first).await;
        reading.cancel(&[1]);
        let (life, second) = reading.taken(submit(2)).unwrap().unwrap();
        let mut second = pin!(reading.handle.submit_when_room(life, second));
        poll_fn(|cx| {
            assert!(
                second.as_mut().poll(cx).is_pending(),
                "there is no room yet"
            );
            Poll::Ready(())
        })
        .await;
        let (_, cancelled) = device.recv().await.unwrap();
        assert!(cancelled.token_channel.is_closed());
        second.await;
        let (_, next) = device.recv().await.unwrap();
        assert!(!next.token_channel.is_closed());
    }
}
