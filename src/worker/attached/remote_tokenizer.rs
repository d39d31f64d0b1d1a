//! The tokenizer and the chat template of a model whose workers are remote. Any worker of the model can answer a
//! call.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::proto::v1;
use crate::proto::worker as proto;
use crate::proto::worker::answer::Answer;
use crate::proto::worker::question::Operation;
use crate::request::{ChatMessage, TokenId};
use crate::runner::{BosPolicy, Model, ModelError, ModelFacts, TokenBytes};
use crate::worker::{WorkerId, wire};

/// Capacity of the queue of tokenizer calls to one worker. While the queue is full, callers wait.
const QUEUE_CAPACITY: usize = 64;

/// A tokenizer call to a worker, and the channel for its answer.
pub(super) struct TokenizerCall {
    pub(super) operation: Operation,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// The workers of one model that can answer tokenizer calls.
#[derive(Default)]
pub(super) struct RemoteTokenizers {
    ready: Mutex<VecDeque<(WorkerId, mpsc::Sender<TokenizerCall>)>>,
}

impl RemoteTokenizers {
    /// Adds a worker. Returns the receiving end of its queue of calls.
    pub(super) fn add(&self, worker: WorkerId) -> mpsc::Receiver<TokenizerCall> {
        let (sender, receiver) = mpsc::channel(QUEUE_CAPACITY);
        self.worker_queues().push_back((worker, sender));
        receiver
    }

    /// Removes a worker. Dropping its queue makes the callers of its unanswered calls try another worker.
    pub(super) fn remove(&self, worker: WorkerId) {
        self.worker_queues().retain(|(known, _)| *known != worker);
    }

    /// Calls one worker after the other until one answers, each with a timeout of `timeout_per_worker`.
    async fn call_any_worker(
        &self,
        operation: &Operation,
        timeout_per_worker: Duration,
    ) -> Result<Answer, ModelError> {
        let message = "No worker of this model answered the tokenizer call.";
        let mut last_error = ModelError::Unavailable(message.to_owned());
        for queue in self.rotated_queues() {
            match timeout(timeout_per_worker, call_worker(&queue, operation.clone())).await {
                Ok(Some(Answer::Failure(failure))) => match wire::model_error(Some(failure)) {
                    invalid @ ModelError::Invalid(_) => return Err(invalid),
                    // The error may be specific to this worker, so try the next one.
                    other @ (ModelError::Failed(_) | ModelError::Unavailable(_)) => {
                        last_error = other;
                    }
                },
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) | Err(_) => {}
            }
        }
        Err(last_error)
    }

    /// Returns the queues of all workers. Each call starts with another worker, so that a slow worker does not delay
    /// every caller.
    fn rotated_queues(&self) -> Vec<mpsc::Sender<TokenizerCall>> {
        let mut ready = self.worker_queues();
        let queues = ready.iter().map(|(_, queue)| queue.clone());
        let queues = queues.collect();
        if let Some(first) = ready.pop_front() {
            ready.push_back(first);
        }
        queues
    }

    fn worker_queues(&self) -> MutexGuard<'_, VecDeque<(WorkerId, mpsc::Sender<TokenizerCall>)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a call to one worker and waits for the answer. Returns `None` if the worker has disconnected.
async fn call_worker(queue: &mpsc::Sender<TokenizerCall>, operation: Operation) -> Option<Answer> {
    let (answer, receiver) = oneshot::channel();
    queue.send(TokenizerCall { operation, answer }).await.ok()?;
    receiver.await.ok()
}

/// A model whose workers are remote.
pub(super) struct RemoteModel {
    pub(super) facts: ModelFacts,
    pub(super) tokenizers: Arc<RemoteTokenizers>,
    /// Maximum wait for the answer of one worker.
    pub(super) call_timeout: Duration,
}

impl RemoteModel {
    /// Blocks until a worker has answered the call. Never runs on an async thread, because `tokenizes_inline` is
    /// false.
    fn call(&self, operation: &Operation) -> Result<Answer, ModelError> {
        Handle::current().block_on(
            self.tokenizers
                .call_any_worker(operation, self.call_timeout),
        )
    }

    fn ids(&self, operation: &Operation) -> Result<Vec<TokenId>, ModelError> {
        match self.call(operation)? {
            Answer::Ids(v1::TokenIds { ids }) => Ok(ids),
            Answer::Pieces(_) | Answer::Text(_) | Answer::Failure(_) => Err(mismatched_answer()),
        }
    }
}

impl Model for RemoteModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        self.ids(&Operation::Tokenize(proto::Tokenize {
            text: text.to_owned(),
            begins: bos == BosPolicy::Add,
        }))
    }

    fn tokenize_infill(&self, prefix: &str, suffix: &str) -> Result<Vec<TokenId>, ModelError> {
        self.ids(&Operation::Infill(proto::Infill {
            prefix: prefix.to_owned(),
            suffix: suffix.to_owned(),
        }))
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let operation = Operation::Detokenize(proto::Detokenize { ids: ids.to_vec() });
        match self.call(&operation)? {
            Answer::Pieces(pieces) => {
                wire::token_bytes(&pieces, ids.len()).ok_or_else(mismatched_answer)
            }
            Answer::Ids(_) | Answer::Text(_) | Answer::Failure(_) => Err(mismatched_answer()),
        }
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let message = |message: &ChatMessage| v1::ChatMessage {
            role: message.role.clone(),
            content: message.content.clone(),
            name: message.name.clone().unwrap_or_default(),
            ..v1::ChatMessage::default()
        };
        let messages = messages.iter().map(message).collect();
        match self.call(&Operation::RenderChat(proto::RenderChat { messages }))? {
            Answer::Text(text) => Ok(text),
            Answer::Ids(_) | Answer::Pieces(_) | Answer::Failure(_) => Err(mismatched_answer()),
        }
    }

    fn tokenizes_inline(&self) -> bool {
        false
    }
}

/// Error for an answer that does not fit the call. Never returned in practice, because the worker's session rejects
/// such answers.
fn mismatched_answer() -> ModelError {
    ModelError::Failed("a worker's answer does not match its tokenizer call".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn operation() -> Operation {
        Operation::Tokenize(proto::Tokenize::default())
    }

    fn text(of: &str) -> Answer {
        Answer::Text(of.to_owned())
    }

    /// Answers the next tokenizer call in the queue with `with`.
    async fn answer(queue: &mut mpsc::Receiver<TokenizerCall>, with: Answer) {
        let request = queue.recv().await.expect("a call");
        request.answer.send(with).expect("a waiting caller");
    }

    #[tokio::test]
    async fn tokenizer_calls_rotate_over_the_workers() {
        let tokenizers = RemoteTokenizers::default();
        let mut one = tokenizers.add(WorkerId(1));
        let mut two = tokenizers.add(WorkerId(2));
        for _ in 0..2 {
            let operation = operation();
            let (answered, ()) = tokio::join!(
                tokenizers.call_any_worker(&operation, TIMEOUT),
                answer(&mut one, text("one"))
            );
            assert_eq!(answered, Ok(text("one")));
            let (answered, ()) = tokio::join!(
                tokenizers.call_any_worker(&operation, TIMEOUT),
                answer(&mut two, text("two"))
            );
            assert_eq!(answered, Ok(text("two")));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_skips_workers_that_left_or_do_not_answer() {
        let tokenizers = RemoteTokenizers::default();
        let leaving = tokenizers.add(WorkerId(1));
        let _silent = tokenizers.add(WorkerId(2));
        let mut answering = tokenizers.add(WorkerId(3));
        drop(leaving);
        let operation = operation();
        let (answered, ()) = tokio::join!(
            tokenizers.call_any_worker(&operation, TIMEOUT),
            answer(&mut answering, text("three"))
        );
        assert_eq!(answered, Ok(text("three")));
    }
}
