//! Admits requests, queues them and assigns their choices to free slots of workers.
//!
//! `Scheduler` is a handle. One task owns the state, and its decisions are a synchronous struct ([`plan`]). Tokens
//! do not pass through the scheduler: workers send tokens directly to the completion's stream. This module must not
//! know the protocols.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Histogram};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind};
use crate::models::{ModelId, Models, Readiness};
use crate::runner::{Resumption, Sequence};
use crate::telemetry::{RequestGauge, WorkerCounts};
use crate::worker::token_channel::{TokenReceiver, token_channel};
use crate::worker::{Assignment, AssignmentId};

mod parts;
pub mod plan;
mod prompt_hasher;
mod resumer;
mod submission;
mod task;
#[cfg(test)]
mod tests;
mod worker_statuses;

pub use parts::ResumptionLimits;
pub(crate) use parts::{LocalWorker, SchedulerParts};
use plan::CallerShare;
use prompt_hasher::PromptHasher;
pub(crate) use resumer::Resumer;
pub use resumer::worker_lost_error;
pub(crate) use resumer::{LossHistory, WorkerLoss};
use submission::{SchedulerMessage, SubmittedWork};

/// Maximum number of tokens that a sequence may produce ahead of its reader.
const TOKEN_CREDIT: usize = 256;

/// Maximum number of submissions in the channel to the scheduler's task. The task handles each in microseconds.
const SUBMISSION_CAPACITY: usize = 1024;

/// A handle that submits requests to the scheduler's task.
pub(crate) struct Scheduler {
    models: Models,
    submissions: mpsc::Sender<SchedulerMessage>,
    /// Id of the next assignment.
    next_assignment: AtomicU64,
    abandoned: Arc<Notify>,
    readiness: watch::Receiver<Readiness>,
    workers: watch::Receiver<WorkerCounts>,
    draining: CancellationToken,
    stopping: CancellationToken,
    resumption: ResumptionLimits,
    prompt_hasher: PromptHasher,
    tokens_wasted: Counter,
    resumptions: Counter,
    tokens_replayed: Counter,
    resumption_gap_seconds: Histogram,
}

/// A request to run: the sequences of its choices.
pub(crate) struct NewRequest {
    /// The model of the sequences.
    pub model: ModelId,
    /// The caller, and its share of slots and queue.
    pub caller: CallerShare,
    /// The priority. Lower numbers run first.
    pub priority: i32,
    /// The time at which the request fails with `deadline_exceeded`.
    pub deadline: Instant,
    /// One sequence per choice, at least one. They differ only in the choice's index and in the tokens that the
    /// client already has.
    pub choices: Vec<Sequence>,
}

/// An admitted request: each choice either runs or waits for a slot.
pub(crate) struct Admitted {
    /// The token channel of each choice. Dropping one cancels its choice.
    pub token_channels: Vec<TokenReceiver>,
    /// True if the model's runner can start a sequence from tokens that an earlier one has computed.
    pub reuses_prefixes: bool,
    /// Resumes choices whose worker was lost. `None` if the model does not support resumption.
    pub resumer: Option<Resumer>,
    /// Histogram of the time between the loss of a choice's worker and the choice's next token.
    pub resumption_gap_seconds: Histogram,
}

impl Admitted {
    /// Gives each token channel the request's metrics counter. If a worker ends a choice because of its slow reader,
    /// the request then counts as lingering.
    pub(crate) fn set_request_gauge(&self, stream: &RequestGauge) {
        for token_channel in &self.token_channels {
            token_channel.set_request_gauge(stream.clone());
        }
    }
}

impl Scheduler {
    /// Creates a scheduler and its task. The task ends after [`Self::stop`].
    pub(crate) fn new(
        parts: SchedulerParts,
    ) -> (Arc<Self>, impl Future<Output = ()> + Send + 'static) {
        let (submissions, receiver) = mpsc::channel(SUBMISSION_CAPACITY);
        let abandoned = Arc::new(Notify::new());
        let (readiness_sender, readiness) = watch::channel(Readiness::Loading(0.0));
        let (workers_sender, workers) = watch::channel(WorkerCounts::new());
        let scheduler = Arc::new(Self {
            models: parts.models.clone(),
            submissions,
            next_assignment: AtomicU64::new(0),
            abandoned: Arc::clone(&abandoned),
            readiness,
            workers,
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            resumption: parts.resumption,
            prompt_hasher: PromptHasher::default(),
            tokens_wasted: parts.telemetry.tokens_wasted.clone(),
            resumptions: parts.telemetry.resumptions.clone(),
            tokens_replayed: parts.telemetry.tokens_replayed.clone(),
            resumption_gap_seconds: parts.telemetry.resumption_gap_seconds.clone(),
        });
        let stopping = scheduler.stopping.clone();
        let signals = task::Signals {
            abandoned,
            stopping,
        };
        let task = task::run(parts, receiver, signals, (readiness_sender, workers_sender));
        (scheduler, task)
    }

    /// The models of the engine.
    pub(crate) fn models(&self) -> &Models {
        &self.models
    }

    /// Watches the readiness of the engine.
    #[must_use]
    pub(crate) fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Watches the number of workers in each state.
    #[must_use]
    pub(crate) fn workers(&self) -> watch::Receiver<WorkerCounts> {
        self.workers.clone()
    }

    /// Rejects requests that arrive from now on with `draining`.
    pub(crate) fn drain(&self) {
        self.draining.cancel();
    }

    /// Fails all queued and running requests with `draining`, and stops all workers.
    pub(crate) fn stop(&self) {
        self.drain();
        self.stopping.cancel();
    }

    /// Checks that the scheduler accepts requests that arrive now.
    ///
    /// # Errors
    /// Returns [`ErrorKind::Draining`] after [`Self::drain`] or [`Self::stop`].
    pub(crate) fn check_accepting(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            let message = "The server is shutting down.";
            return Err(Error::new(ErrorKind::Draining, message));
        }
        Ok(())
    }

    /// Admits a request. After success, the request runs or waits in the queue.
    ///
    /// The caller must have called [`Self::check_accepting`] when the request arrived. If a drain has started since,
    /// the request may still finish, like all running requests.
    ///
    /// # Errors
    /// Returns the reason for a rejection.
    pub(crate) async fn submit(self: &Arc<Self>, request: NewRequest) -> Result<Admitted, Error> {
        let NewRequest {
            model,
            caller,
            priority,
            deadline,
            choices,
        } = request;
        if deadline <= Instant::now() {
            let message = "The request's deadline passed before it was queued.";
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        let loaded = self.models.get(model).loaded_model()?;
        let prompt_blocks = match choices.first() {
            Some(first) if loaded.facts().reuses_prefixes => Arc::new(
                self.prompt_hasher
                    .hash(&first.prompt, &first.options.cache_salt),
            ),
            Some(_) | None => Arc::default(),
        };
        let resumer = match loaded.facts().resumption {
            Resumption::Exact | Resumption::Contiguous => choices.first().map(|first| Resumer {
                scheduler: Arc::clone(self),
                model,
                caller: caller.clone(),
                priority,
                sequence: first.clone(),
                prompt_blocks: Arc::clone(&prompt_blocks),
                deadline,
            }),
            Resumption::No => None,
        };
        // Most requests have one choice. `unzip` would reserve room for four, for as long as the request is queued.
        let mut assignments = Vec::with_capacity(choices.len());
        let mut token_channels = Vec::with_capacity(choices.len());
        for sequence in choices {
            let (mut assignment, token_channel) = self.assignment(sequence, deadline);
            assignment.prompt_blocks = Arc::clone(&prompt_blocks);
            assignments.push(assignment);
            token_channels.push(token_channel);
        }
        let (admitted, admission) = oneshot::channel();
        let submission = SchedulerMessage {
            model,
            caller,
            priority,
            work: SubmittedWork::New {
                deadline,
                choices: assignments,
                admitted,
            },
        };
        self.submissions
            .send(submission)
            .await
            .map_err(|_| Error::internal())?;
        admission.await.map_err(|_| Error::internal())??;
        Ok(Admitted {
            token_channels,
            reuses_prefixes: loaded.facts().reuses_prefixes,
            resumer,
            resumption_gap_seconds: self.resumption_gap_seconds.clone(),
        })
    }

    /// Creates an assignment and the receiver of its tokens.
    fn assignment(&self, sequence: Sequence, deadline: Instant) -> (Assignment, TokenReceiver) {
        let max_tokens = usize::try_from(sequence.max_tokens).unwrap_or(usize::MAX);
        let scored = if sequence.scores_prompt {
            sequence.prompt.len()
        } else {
            0
        };
        // The channel never holds more tokens than the sequence produces, so it needs no more credit. The sum is at
        // least 1: a channel must have credit.
        let credit = TOKEN_CREDIT.min(max_tokens.saturating_add(scored + 2));
        let (sender, receiver) = token_channel(
            credit,
            Arc::clone(&self.abandoned),
            self.tokens_wasted.clone(),
        );
        let id = self.next_assignment.fetch_add(1, Ordering::Relaxed);
        let assignment = Assignment {
            id: AssignmentId(id),
            sequence,
            token_channel: sender,
            deadline,
            prompt_blocks: Arc::default(),
            is_suspect: false,
        };
        (assignment, receiver)
    }
}
