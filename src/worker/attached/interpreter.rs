//! The tokenizer and the chat template of a model whose workers are elsewhere: any of them is asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::question::About;
use crate::request::{ChatMessage, TokenId};
use crate::runner::{Beginning, Model, ModelError, ModelFacts, TokenBytes};
use crate::worker::{WorkerId, wire};

/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many questions may wait for a worker's connection; who asks the next waits too.
const QUESTIONS: usize = 64;

/// How many questions a worker may have open at once.
pub(super) const OPEN: usize = 32;

/// A question on its way to a worker, and where its answer goes.
pub(super) struct Asked {
    pub(super) about: About,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// The workers of one model that can be asked.
#[derive(Default)]
pub(super) struct Interpreters {
    ready: Mutex<Vec<(WorkerId, mpsc::Sender<Asked>)>>,
}

impl Interpreters {
    /// A worker can be asked from now on: what it is asked comes here.
    pub(super) fn add(&self, worker: WorkerId) -> mpsc::Receiver<Asked> {
        let (sender, receiver) = mpsc::channel(QUESTIONS);
        self.ready().push((worker, sender));
        receiver
    }

    /// A worker can no longer be asked. What it was asked and has not answered, another is asked.
    pub(super) fn remove(&self, worker: WorkerId) {
        self.ready().retain(|(known, _)| *known != worker);
    }

    /// Asks one worker after the other until one answers.
    async fn ask(&self, about: &About) -> Result<Answer, ModelError> {
        let message = "No worker of this model could be asked.";
        let mut refusal = ModelError::Unavailable(message.to_owned());
        let workers = self.ready().clone();
        for (_, questions) in workers {
            match timeout(PATIENCE, ask_one(&questions, about.clone())).await {
                Ok(Some(Answer::Failure(failure))) => match wire::model_error(Some(failure)) {
                    invalid @ ModelError::Invalid(_) => return Err(invalid),
                    // Another may be able to say.
                    other @ (ModelError::Failed(_) | ModelError::Unavailable(_)) => refusal = other,
                },
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) | Err(_) => {}
            }
        }
        Err(refusal)
    }

    /// Held for a change or a copy.
    fn ready(&self) -> MutexGuard<'_, Vec<(WorkerId, mpsc::Sender<Asked>)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks a worker. It is gone where there is no answer.
async fn ask_one(questions: &mpsc::Sender<Asked>, about: About) -> Option<Answer> {
    let (answer, answered) = oneshot::channel();
    questions.send(Asked { about, answer }).await.ok()?;
    answered.await.ok()
}

/// A model whose workers are elsewhere.
pub(super) struct RemoteModel {
    pub(super) facts: ModelFacts,
    pub(super) interpreters: Arc<Interpreters>,
}

impl RemoteModel {
    /// Asks, and waits: this is no thread of the runtime's own.
    fn ask(&self, about: &About) -> Result<Answer, ModelError> {
        Handle::current().block_on(self.interpreters.ask(about))
    }

    fn ids(&self, about: &About) -> Result<Vec<TokenId>, ModelError> {
        let ids = match self.ask(about)? {
            Answer::Ids(proto::TokenIds { ids }) => ids,
            Answer::Pieces(_) | Answer::Text(_) | Answer::Failure(_) => return Err(other_answer()),
        };
        match ids.iter().find(|id| **id >= self.facts.vocabulary_size) {
            None => Ok(ids),
            Some(_) => Err(other_answer()),
        }
    }
}

impl Model for RemoteModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, beginning: Beginning) -> Result<Vec<TokenId>, ModelError> {
        self.ids(&About::Tokenize(proto::Tokenize {
            text: text.to_owned(),
            begins: beginning == Beginning::Marked,
        }))
    }

    fn infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        self.ids(&About::Infill(proto::Infill {
            prefix: prefix.to_owned(),
            suffix: suffix.to_owned(),
        }))
    }

    fn pieces(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let about = About::Detokenize(proto::Detokenize { ids: ids.to_vec() });
        match self.ask(&about)? {
            Answer::Pieces(pieces) => {
                wire::token_bytes(&pieces, ids.len()).ok_or_else(other_answer)
            }
            Answer::Ids(_) | Answer::Text(_) | Answer::Failure(_) => Err(other_answer()),
        }
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let message = |message: &ChatMessage| proto::ChatMessage {
            role: message.role.clone(),
            content: message.content.clone(),
            name: message.name.clone().unwrap_or_default(),
        };
        let messages = messages.iter().map(message).collect();
        match self.ask(&About::RenderChat(proto::RenderChat { messages }))? {
            Answer::Text(text) => Ok(text),
            Answer::Ids(_) | Answer::Pieces(_) | Answer::Failure(_) => Err(other_answer()),
        }
    }

    fn is_quick(&self) -> bool {
        false
    }
}

fn other_answer() -> ModelError {
    ModelError::Failed("a worker's answer does not fit its question".to_owned())
}
