//! Who runs, where and when: admission, a bounded queue, placement on workers' free slots.
//!
//! One task owns the decisions, which are a plain struct (`plan`); this handle talks to it. Tokens
//! never pass through here. It must not know protocols.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Histogram};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind};
use crate::request::{CompletionRequest, Parameter};
use crate::runner::{Resumption, Sequence};
use crate::telemetry::{StreamCount, Telemetry, WorkerCounts};
use crate::worker::token_channel::{TokenReceiver, token_channel};
use crate::worker::{Assignment, WorkerEvent, WorkerHandle, WorkerId};

mod catalog;
pub mod plan;
mod readiness;
mod resumer;
mod task;
#[cfg(test)]
mod tests;

use catalog::Prompt;
pub use catalog::{Catalog, CatalogEntry, DeliveredToken, UnknownModel};
pub use readiness::Readiness;
pub use resumer::{LossHistory, PendingResumption, Resumer, WorkerLoss, worker_lost};

/// How far a sequence may run ahead of its reader, in tokens.
const TOKEN_CREDIT: usize = 256;

/// How many submissions may wait for the scheduler's task, which takes each in microseconds.
const SUBMISSION_CAPACITY: usize = 1024;

/// What a scheduler is made of.
pub struct SchedulerParts {
    /// The models, in the order in which they are listed.
    pub catalog: Catalog,
    /// The engine's own workers.
    pub workers: Vec<OwnedWorker>,
    /// What the workers tell.
    pub events: mpsc::Receiver<WorkerEvent>,
    /// For each model, the most requests that may wait for a first slot.
    pub queue_depths: Vec<usize>,
    /// How far a choice is followed whose workers are lost.
    pub resumption: ResumptionLimits,
    /// What is counted into.
    pub telemetry: Telemetry,
}

/// How far a choice is followed whose workers are lost.
#[derive(Clone, Copy, Debug)]
pub struct ResumptionLimits {
    /// How often in a row it goes on elsewhere without having made a token in between.
    pub max_consecutive: u32,
    /// How long it waits each time for a worker that takes it.
    pub acceptance_timeout: Duration,
}

impl Default for ResumptionLimits {
    /// Twice, and for a minute.
    fn default() -> Self {
        Self {
            max_consecutive: 2,
            acceptance_timeout: Duration::from_secs(60),
        }
    }
}

/// A worker that belongs to an engine for as long as that runs.
pub struct OwnedWorker {
    /// Its id.
    pub worker: WorkerId,
    /// Its model's place in the catalog.
    pub model: usize,
    /// Its handle; `None` until it has dialled in.
    pub handle: Option<WorkerHandle>,
}

/// Takes requests. Clones speak to the same scheduler.
#[derive(Clone)]
pub struct Scheduler {
    catalog: Catalog,
    submissions: mpsc::Sender<Submission>,
    abandoned: Arc<Notify>,
    readiness: watch::Receiver<Readiness>,
    workers: watch::Receiver<WorkerCounts>,
    draining: CancellationToken,
    stopping: CancellationToken,
    resumption: ResumptionLimits,
    tokens_wasted: Counter,
    resumptions: Counter,
    tokens_replayed: Counter,
    gaps: Histogram,
}

/// A request that was admitted: it waits for its slots, or runs.
pub struct Admitted {
    /// The model's name.
    pub model: Arc<str>,
    /// How many tokens the prompt has.
    pub prompt_tokens: u32,
    /// The prompt's text, where it is asked for.
    pub echo: Option<String>,
    /// Whether the first choice's token_channel begins with the prompt's tokens.
    pub scores_prompt: bool,
    /// What the client already has of each choice, from the first on.
    pub resumed: Vec<Vec<DeliveredToken>>,
    /// One token_channel for each choice. Dropping one cancels its choice.
    pub lanes: Vec<TokenReceiver>,
    /// How its choices go on when their workers are lost; `None` where they cannot.
    pub resumer: Option<Resumer>,
    /// Where the seconds go that a choice has waited for its next token when its worker was lost.
    pub gaps: Histogram,
    /// When the request arrived.
    pub arrived: Instant,
    /// When its client no longer waits.
    pub deadline: Instant,
}

impl Admitted {
    /// Has this stream counted as given up when its reader is too slow.
    pub fn set_stream_count(&self, stream: &StreamCount) {
        for token_channel in &self.lanes {
            token_channel.set_stream_count(stream.clone());
        }
    }
}

/// A request on its way to the queue.
struct Submission {
    model: usize,
    priority: i32,
    work: Work,
}

/// What is to be run.
enum Work {
    /// A request that came just now.
    New {
        choices: Vec<Assignment>,
        /// Told once whether the request is in the queue.
        admitted: oneshot::Sender<Result<(), Error>>,
    },
    /// A choice whose worker was lost.
    Resumed(Box<Assignment>),
}

impl Scheduler {
    /// A scheduler, and the task that decides for it. The task ends once it is stopped.
    pub fn new(parts: SchedulerParts) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (submissions, receiver) = mpsc::channel(SUBMISSION_CAPACITY);
        let abandoned = Arc::new(Notify::new());
        let (readiness_sender, readiness) = watch::channel(Readiness::Loading(0.0));
        let (workers_sender, workers) = watch::channel(WorkerCounts::new());
        let scheduler = Self {
            catalog: parts.catalog.clone(),
            submissions,
            abandoned: Arc::clone(&abandoned),
            readiness,
            workers,
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            resumption: parts.resumption,
            tokens_wasted: parts.telemetry.tokens_wasted.clone(),
            resumptions: parts.telemetry.resumptions.clone(),
            tokens_replayed: parts.telemetry.tokens_replayed.clone(),
            gaps: parts.telemetry.resumption_gap_seconds.clone(),
        };
        let stopping = scheduler.stopping.clone();
        let signals = task::Signals {
            abandoned,
            stopping,
        };
        let task = task::run(parts, receiver, signals, (readiness_sender, workers_sender));
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

    /// How many workers are in each state, as it changes.
    #[must_use]
    pub fn workers(&self) -> watch::Receiver<WorkerCounts> {
        self.workers.clone()
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
        entry.check_supported(request)?;
        let prompt = entry.prompt(request).await?;
        if request.deadline <= Instant::now() {
            let message = "The request's deadline had passed before it could be queued.";
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        let prompt_tokens = u32::try_from(prompt.ids.len()).expect("it fits into the context");
        let resumer = match entry.model()?.facts().resumption {
            Resumption::Exact | Resumption::Contiguous => Some(Resumer {
                scheduler: self.clone(),
                model,
                priority: request.priority,
                sequence: sequence(request, &prompt, 0),
                deadline: request.deadline,
            }),
            Resumption::No => None,
        };
        let (choices, lanes) = self.choices(request, &prompt);
        let (admitted, answer) = oneshot::channel();
        let submission = Submission {
            model,
            priority: request.priority,
            work: Work::New { choices, admitted },
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
            resumed: prompt.resumed,
            scores_prompt: scores_prompt(request),
            lanes,
            resumer,
            gaps: self.gaps.clone(),
            arrived: request.arrived,
            deadline: request.deadline,
        })
    }

    fn choices(
        &self,
        request: &CompletionRequest,
        prompt: &Prompt,
    ) -> (Vec<Assignment>, Vec<TokenReceiver>) {
        let choices = (0..request.choices).map(|choice| {
            let mut sequence = sequence(request, prompt, choice);
            let held = usize::try_from(choice)
                .ok()
                .and_then(|at| request.resume.get(at));
            sequence.delivered = held.cloned().unwrap_or_default();
            self.assignment(sequence, request.deadline)
        });
        choices.unzip()
    }

    /// A sequence with a token_channel for its tokens.
    fn assignment(&self, sequence: Sequence, deadline: Instant) -> (Assignment, TokenReceiver) {
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let scored = if sequence.scores_prompt {
            sequence.prompt.len()
        } else {
            0
        };
        // No token_channel needs more credit than the tokens that it will carry, and a place for its beginning.
        let credit = TOKEN_CREDIT.min(max_tokens.saturating_add(scored + 2));
        let (sender, receiver) = token_channel(
            credit,
            Arc::clone(&self.abandoned),
            self.tokens_wasted.clone(),
        );
        let assignment = Assignment {
            sequence,
            token_channel: sender,
            deadline,
            is_suspect: false,
        };
        (assignment, receiver)
    }
}

/// A choice of a request, as a device sees it.
fn sequence(request: &CompletionRequest, prompt: &Prompt, choice: u32) -> Sequence {
    Sequence {
        prompt: Arc::clone(&prompt.ids),
        delivered: Vec::new(),
        choice,
        seed: request.seed,
        max_tokens: prompt.max_tokens,
        sampling: request.sampling,
        logit_bias: Arc::clone(&request.logit_bias),
        stop_tokens: request.stopping.tokens.clone(),
        logprobs: request.logprobs,
        // What the model thinks of the prompt is the same for every choice.
        scores_prompt: choice == 0 && scores_prompt(request),
        timestamps: request.timestamps,
        caller: request.caller.clone(),
    }
}

/// Whether the prompt's own log probabilities are asked for.
fn scores_prompt(request: &CompletionRequest) -> bool {
    request.needs(Parameter::EchoLogprobs)
}
