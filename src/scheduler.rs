//! Who runs, where and when: admission, a bounded queue, placement on workers' free slots.
//!
//! One task owns the decisions, which are a plain struct (`plan`); this handle talks to it. Tokens
//! never pass through here. It must not know protocols.

use std::sync::Arc;

use metrics::Counter;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind};
use crate::request::{CompletionRequest, Parameter};
use crate::runner::Sequence;
use crate::telemetry::Telemetry;
use crate::worker::lane::{LaneReceiver, lane};
use crate::worker::{Assignment, WorkerEvent, WorkerHandle};

mod catalog;
pub mod plan;
mod readiness;
mod task;
#[cfg(test)]
mod tests;

use catalog::Prompt;
pub use catalog::{Catalog, CatalogEntry};
pub use readiness::Readiness;

/// How far a sequence may run ahead of its reader, in tokens.
const CREDIT: usize = 256;

/// How many submissions may wait for the scheduler's task, which takes each in microseconds.
const MAILBOX: usize = 1024;

/// What a scheduler is made of.
pub struct Parts {
    /// The models, in the order in which they are listed.
    pub catalog: Catalog,
    /// The workers by their ids, each with its model's place in the catalog and its number of slots.
    pub workers: Vec<(WorkerHandle, usize, usize)>,
    /// What the workers tell.
    pub events: mpsc::Receiver<WorkerEvent>,
    /// For each model, the most requests that may wait for a first slot.
    pub queue_depths: Vec<usize>,
    /// What is counted into.
    pub telemetry: Telemetry,
}

/// Takes requests. Clones speak to the same scheduler.
#[derive(Clone)]
pub struct Scheduler {
    catalog: Catalog,
    submissions: mpsc::Sender<Submission>,
    abandoned: Arc<Notify>,
    readiness: watch::Receiver<Readiness>,
    draining: CancellationToken,
    stopping: CancellationToken,
    tokens_wasted: Counter,
}

/// A request that was admitted: it waits for its slots, or runs.
pub struct Admitted {
    /// The model's name.
    pub model: Arc<str>,
    /// How many tokens the prompt has.
    pub prompt_tokens: u32,
    /// The prompt's text, where it is asked for.
    pub echo: Option<String>,
    /// Whether the first choice's lane begins with the prompt's tokens.
    pub scores_prompt: bool,
    /// One lane for each choice. Dropping one cancels its choice.
    pub lanes: Vec<LaneReceiver>,
    /// When the request arrived.
    pub arrived: Instant,
    /// When its client no longer waits.
    pub deadline: Instant,
}

/// A request on its way to the queue.
struct Submission {
    model: usize,
    priority: i32,
    choices: Vec<Assignment>,
    /// Told once whether the request is in the queue.
    admitted: oneshot::Sender<Result<(), Error>>,
}

impl Scheduler {
    /// A scheduler, and the task that decides for it. The task ends once it is stopped.
    pub fn new(parts: Parts) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (submissions, receiver) = mpsc::channel(MAILBOX);
        let abandoned = Arc::new(Notify::new());
        let (readiness_sender, readiness) = watch::channel(Readiness::Loading(0.0));
        let scheduler = Self {
            catalog: parts.catalog.clone(),
            submissions,
            abandoned: Arc::clone(&abandoned),
            readiness,
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            tokens_wasted: parts.telemetry.tokens_wasted.clone(),
        };
        let stopping = scheduler.stopping.clone();
        let signals = task::Signals {
            abandoned,
            stopping,
        };
        let task = task::run(parts, receiver, signals, readiness_sender);
        (scheduler, task)
    }

    /// The models.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// How able the workers are, as it changes.
    #[must_use]
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Refuses every new request from now on.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Ends every request that still waits or runs with a terminal error, and every worker.
    pub fn stop(&self) {
        self.drain();
        self.stopping.cancel();
    }

    /// Whether new requests are refused because the server is shutting down.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Admits a request: its model is known, its prompt is tokenized and fits, and it is in the queue
    /// or runs already.
    ///
    /// # Errors
    /// The reason why it is refused.
    pub async fn submit(&self, request: &CompletionRequest) -> Result<Admitted, Error> {
        if self.is_draining() {
            return Err(Error::new(
                ErrorKind::Draining,
                "The server is shutting down.",
            ));
        }
        let (model, entry) = self.catalog.find(request.model.as_deref())?;
        entry.check_honoured(request)?;
        let prompt = entry.prompt(request).await?;
        if request.deadline <= Instant::now() {
            let message = "The request's deadline had passed before it could be queued.";
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        let prompt_tokens = u32::try_from(prompt.ids.len()).expect("it fits into the context");
        let (choices, lanes) = self.choices(request, &prompt);
        let (admitted, answer) = oneshot::channel();
        let submission = Submission {
            model,
            priority: request.priority,
            choices,
            admitted,
        };
        self.submissions
            .send(submission)
            .await
            .map_err(|_| Error::internal())?;
        answer.await.map_err(|_| Error::internal())??;
        Ok(Admitted {
            model: Arc::clone(&entry.name),
            prompt_tokens,
            echo: prompt.text,
            scores_prompt: scores_prompt(request),
            lanes,
            arrived: request.arrived,
            deadline: request.deadline,
        })
    }

    fn choices(
        &self,
        request: &CompletionRequest,
        prompt: &Prompt,
    ) -> (Vec<Assignment>, Vec<LaneReceiver>) {
        let max_tokens = usize::try_from(prompt.max_tokens).unwrap_or(usize::MAX);
        (0..request.choices)
            .map(|choice| {
                // What the model thinks of the prompt is the same for every choice.
                let scores_prompt = choice == 0 && scores_prompt(request);
                let scored = if scores_prompt { prompt.ids.len() } else { 0 };
                // No lane needs more credit than the tokens that it will carry, and a place for its beginning.
                let credit = CREDIT.min(max_tokens.saturating_add(scored + 2));
                let (sender, receiver) = lane(
                    credit,
                    Arc::clone(&self.abandoned),
                    self.tokens_wasted.clone(),
                );
                let sequence = Sequence {
                    prompt: Arc::clone(&prompt.ids),
                    delivered: Vec::new(),
                    choice,
                    seed: request.seed,
                    max_tokens: prompt.max_tokens,
                    sampling: request.sampling,
                    logit_bias: Arc::clone(&request.logit_bias),
                    stop_tokens: request.stopping.tokens.clone(),
                    logprobs: request.logprobs,
                    scores_prompt,
                    stamps: request.stamps,
                    caller: request.caller.clone(),
                };
                let deadline = request.deadline;
                (
                    Assignment {
                        sequence,
                        lane: sender,
                        deadline,
                    },
                    receiver,
                )
            })
            .unzip()
    }
}

/// Whether the prompt's own log probabilities are asked for.
fn scores_prompt(request: &CompletionRequest) -> bool {
    request.needs(Parameter::EchoLogprobs)
}
