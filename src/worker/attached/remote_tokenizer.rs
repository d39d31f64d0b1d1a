//! The tokenizer and the chat template of a model whose workers are elsewhere: any of them is asked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::question::About;
use crate::request::{ChatMessage, TokenId};
use crate::runner::{BosPolicy, Model, ModelError, ModelFacts, TokenBytes};
use crate::worker::{WorkerId, wire};

/// How many questions may wait for a worker's connection; who asks the next waits too.
const QUESTIONS: usize = 64;

/// A question on its way to a worker, and where its answer goes.
pub(super) struct TokenizerRequest {
    pub(super) about: About,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// The workers of one model that can be asked.
#[derive(Default)]
pub(super) struct RemoteTokenizers {
    ready: Mutex<VecDeque<(WorkerId, mpsc::Sender<TokenizerRequest>)>>,
}

impl RemoteTokenizers {
    /// A worker can be asked from now on: what it is asked comes here.
    pub(super) fn add(&self, worker: WorkerId) -> mpsc::Receiver<TokenizerRequest> {
        let (sender, receiver) = mpsc::channel(QUESTIONS);
        self.ready().push_back((worker, sender));
        receiver
    }

    /// A worker can no longer be asked. What it was asked and has not answered, another is asked.
    pub(super) fn remove(&self, worker: WorkerId) {
        self.ready().retain(|(known, _)| *known != worker);
    }

    /// Asks one worker after the other, each for so long, until one answers.
    async fn ask(&self, about: &About, patience: Duration) -> Result<Answer, ModelError> {
        let message = "No worker of this model could be asked.";
        let mut refusal = ModelError::Unavailable(message.to_owned());
        for questions in self.in_turn() {
            match timeout(patience, ask_one(&questions, about.clone())).await {
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

    /// All of them. Each call begins with another, so that one that is slow is not the first that everybody asks.
    fn in_turn(&self) -> Vec<mpsc::Sender<TokenizerRequest>> {
        let mut ready = self.ready();
        let in_turn = ready.iter().map(|(_, questions)| questions.clone());
        let in_turn = in_turn.collect();
        if let Some(first) = ready.pop_front() {
            ready.push_back(first);
        }
        in_turn
    }

    /// Held for a change or a copy.
    fn ready(&self) -> MutexGuard<'_, VecDeque<(WorkerId, mpsc::Sender<TokenizerRequest>)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks a worker. It is gone where there is no answer.
async fn ask_one(questions: &mpsc::Sender<TokenizerRequest>, about: About) -> Option<Answer> {
    let (answer, answered) = oneshot::channel();
    questions
        .send(TokenizerRequest { about, answer })
        .await
        .ok()?;
    answered.await.ok()
}

/// A model whose workers are elsewhere.
pub(super) struct RemoteModel {
    pub(super) facts: ModelFacts,
    pub(super) interpreters: Arc<RemoteTokenizers>,
    /// How long each worker is asked.
    pub(super) patience: Duration,
}

impl RemoteModel {
    /// Asks, and waits: this is no thread of the runtime's own.
    fn ask(&self, about: &About) -> Result<Answer, ModelError> {
        Handle::current().block_on(self.interpreters.ask(about, self.patience))
    }

    fn ids(&self, about: &About) -> Result<Vec<TokenId>, ModelError> {
        match self.ask(about)? {
            Answer::Ids(proto::TokenIds { ids }) => Ok(ids),
            Answer::Pieces(_) | Answer::Text(_) | Answer::Failure(_) => Err(other_answer()),
        }
    }
}

impl Model for RemoteModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        self.ids(&About::Tokenize(proto::Tokenize {
            text: text.to_owned(),
            begins: bos == BosPolicy::Add,
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

    fn tokenizes_inline(&self) -> bool {
        false
    }
}

/// The worker's session lets no such answer through.
fn other_answer() -> ModelError {
    ModelError::Failed("a worker's answer does not fit its question".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn about() -> About {
        About::Tokenize(proto::Tokenize::default())
    }

    fn text(of: &str) -> Answer {
        Answer::Text(of.to_owned())
    }

    /// Answers the next question with this.
    async fn answer(questions: &mut mpsc::Receiver<TokenizerRequest>, with: Answer) {
        let asked = questions.recv().await.expect("somebody asks");
        asked.answer.send(with).expect("it is waited for");
    }

    #[tokio::test]
    async fn tokenizer_calls_rotate_over_the_workers() {
        let interpreters = RemoteTokenizers::default();
        let mut one = interpreters.add(WorkerId(1));
        let mut two = interpreters.add(WorkerId(2));
        for _ in 0..2 {
            let about = about();
            let (told, ()) = tokio::join!(
                interpreters.ask(&about, PATIENCE),
                answer(&mut one, text("one"))
            );
            assert_eq!(told, Ok(text("one")));
            let (told, ()) = tokio::join!(
                interpreters.ask(&about, PATIENCE),
                answer(&mut two, text("two"))
            );
            assert_eq!(told, Ok(text("two")));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_skips_workers_that_left_or_do_not_answer() {
        let interpreters = RemoteTokenizers::default();
        let leaves = interpreters.add(WorkerId(1));
        let _says_nothing = interpreters.add(WorkerId(2));
        let mut answers = interpreters.add(WorkerId(3));
        drop(leaves);
        let about = about();
        let (told, ()) = tokio::join!(
            interpreters.ask(&about, PATIENCE),
            answer(&mut answers, text("three"))
        );
        assert_eq!(told, Ok(text("three")));
    }
}
