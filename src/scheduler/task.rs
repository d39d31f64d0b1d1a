//! The task that owns the plan. It handles submissions, worker events and notifications of dropped readers.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::parts::SchedulerParts;
use super::plan::{Admission, Admitting, NewWork, Placement, Plan, QueuedChoice};
use super::submission::{SchedulerMessage, SubmittedWork};
use super::worker_statuses::WorkerStatuses;
use crate::error::{Error, ErrorKind};
use crate::models::{ModelId, ModelStatus, Readiness};
use crate::prefix_index::PromptBlocks;
use crate::runner::DeviceFacts;
use crate::telemetry::{Telemetry, WorkerCounts, WorkerState};
use crate::worker::token_channel::Failure;
use crate::worker::{Assignment, AssignmentId, ServedModel, WorkerEvent, WorkerHandle, WorkerId};

/// Signals to the scheduler's task that carry no data.
pub(super) struct Signals {
    /// Notified when the reader of a waiting job is dropped.
    pub(super) abandoned: Arc<Notify>,
    /// Cancelled to stop the scheduler.
    pub(super) stopping: CancellationToken,
}

/// Runs the scheduler's task until the scheduler is stopped or every handle is dropped.
pub(super) async fn run(
    parts: SchedulerParts,
    mut submissions: mpsc::Receiver<SchedulerMessage>,
    signals: Signals,
    (readiness, workers): (watch::Sender<Readiness>, watch::Sender<WorkerCounts>),
) {
    let mut events = parts.events;
    let mut task = Task {
        plan: Plan::new(parts.queue_depths, Instant::now()),
        statuses: WorkerStatuses::new(parts.models),
        handles: HashMap::new(),
        telemetry: parts.telemetry,
        readiness,
        workers,
    };
    for owned in parts.workers {
        task.add_worker(owned.worker, owned.model, owned.handle);
    }
    task.publish_readiness();
    loop {
        tokio::select! {
            // `abandoned` is polled before `submissions`, so that a new request can take the place of one that has
            // just left the queue.
            biased;
            () = signals.stopping.cancelled() => break,
            () = signals.abandoned.notified() => task.plan.drop_abandoned(),
            Some(event) = events.recv() => {
                task.plan.set_now(Instant::now());
                task.handle_event(event);
            }
            submission = submissions.recv() => match submission {
                Some(submission) => {
                    task.plan.set_now(Instant::now());
                    task.submit(submission);
                }
                None => break,
            },
        }
        task.update_queue_gauge();
    }
    task.stop();
    // Workers may still send events until they end. Keep receiving, so that no worker blocks.
    while events.recv().await.is_some() {}
}

struct Task {
    plan: Plan<Assignment>,
    handles: HashMap<WorkerId, WorkerHandle>,
    statuses: WorkerStatuses,
    telemetry: Telemetry,
    readiness: watch::Sender<Readiness>,
    workers: watch::Sender<WorkerCounts>,
}

impl QueuedChoice for Assignment {
    fn id(&self) -> AssignmentId {
        self.id
    }

    fn max_tokens(&self) -> u32 {
        self.sequence.max_tokens
    }

    fn has_reader(&self) -> bool {
        // An expired job is still placed. Its worker fails it with `deadline_exceeded` and does not run it.
        !self.token_channel.is_closed()
    }

    fn prompt_blocks(&self) -> &PromptBlocks {
        &self.prompt_blocks
    }

    fn is_suspect(&self) -> bool {
        self.is_suspect
    }
}

impl Task {
    /// Adds a worker. `handle` is `None` until the worker has connected.
    fn add_worker(&mut self, worker: WorkerId, model: ModelId, handle: Option<WorkerHandle>) {
        self.plan.add_worker(worker, model);
        self.statuses.add_worker(worker, model);
        self.handles.extend(handle.map(|handle| (worker, handle)));
    }

    fn submit(&mut self, submission: SchedulerMessage) {
        let SchedulerMessage {
            model,
            caller,
            priority,
            work,
        } = submission;
        let (deadline, choices, admitted) = match work {
            SubmittedWork::New {
                deadline,
                choices,
                admitted,
            } => (deadline, choices, admitted),
            SubmittedWork::Resumed(choice) => {
                let placements = self.plan.resume(model, caller, priority, *choice);
                return self.submit_placements(placements);
            }
        };
        let Admitting {
            admission,
            placements,
            displaced,
        } = self.plan.admit(NewWork {
            model,
            caller,
            priority,
            deadline,
            choices,
        });
        // If the submitter is gone, the token channels of its jobs are closed, and no worker runs the jobs.
        let _ = admitted.send(result_of(admission));
        for job in displaced {
            job.token_channel.fail(Failure::Displaced);
        }
        self.submit_placements(placements);
    }

    fn handle_event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Joined {
                worker,
                model,
                handle,
            } => {
                self.add_worker(worker, model, Some(handle));
                self.publish_readiness();
            }
            WorkerEvent::Loading { worker, fraction } => {
                self.statuses.set_progress(worker, fraction);
                self.publish_readiness();
            }
            WorkerEvent::Ready {
                worker,
                generation,
                served,
            } => {
                let Some(model) = self.statuses.model_of(worker) else {
                    return;
                };
                log_ready(worker, &model.name, &served);
                model.set_loaded(served.model);
                self.statuses.set_status(worker, ModelStatus::Up);
                let placements = self.plan.set_worker_ready(worker, generation, served.slots);
                self.submit_placements(placements);
                self.publish_readiness();
            }
            WorkerEvent::Stuck { worker, is_stuck } => self.set_stuck(worker, is_stuck),
            WorkerEvent::SuspectCleared { worker, generation } => {
                let placements = self.plan.clear_suspect(worker, generation);
                self.submit_placements(placements);
            }
            WorkerEvent::Released {
                worker,
                generation,
                assignment,
            } => {
                let placements = self.plan.release_slot(worker, generation, assignment);
                self.submit_placements(placements);
            }
            WorkerEvent::Lost { worker, reason } => {
                let model = self.model_of(worker);
                tracing::error!(worker = worker.0, model, %reason, "a worker was lost and will be restarted");
                self.mark_down(worker, ModelStatus::Lost);
            }
            WorkerEvent::LoadFailed { worker, reason } => {
                let model = self.model_of(worker);
                tracing::error!(worker = worker.0, model, %reason, "a worker could not load its model and will retry");
                self.mark_down(worker, ModelStatus::LoadFailed(reason));
            }
            WorkerEvent::GivenUp { worker, reason } => {
                let model = self.model_of(worker);
                tracing::error!(
                    worker = worker.0,
                    model,
                    %reason,
                    "a worker failed to start too often and will not be started again"
                );
                self.mark_down(worker, ModelStatus::GivenUp(reason));
            }
            WorkerEvent::Left { worker, reason } => self.remove_worker(worker, &reason),
        }
    }

    fn remove_worker(&mut self, worker: WorkerId, reason: &str) {
        let model = self.model_of(worker);
        tracing::warn!(worker = worker.0, model, %reason, "a worker has disconnected");
        self.plan.remove_worker(worker);
        self.statuses.remove_worker(worker);
        self.handles.remove(&worker);
        self.publish_readiness();
    }

    /// Records that a device call exceeds the step limit, or that the call has returned.
    fn set_stuck(&mut self, worker: WorkerId, is_stuck: bool) {
        let model = self.model_of(worker);
        let status = if is_stuck {
            tracing::error!(
                worker = worker.0,
                model,
                "a device call exceeds the step limit; it cannot be interrupted"
            );
            ModelStatus::Lost
        } else {
            tracing::warn!(
                worker = worker.0,
                model,
                "the device call that exceeded the step limit has returned"
            );
            ModelStatus::Up
        };
        self.statuses.set_status(worker, status);
        let placements = self.plan.set_stuck(worker, is_stuck);
        self.submit_placements(placements);
        self.publish_readiness();
    }

    /// Returns the name of a worker's model for the log.
    fn model_of(&self, worker: WorkerId) -> &str {
        let model = self.statuses.model_of(worker);
        model.map_or("", |model| &model.name)
    }

    fn mark_down(&mut self, worker: WorkerId, status: ModelStatus) {
        self.statuses.set_status(worker, status);
        self.plan.set_worker_lost(worker);
        self.publish_readiness();
    }

    fn publish_readiness(&self) {
        publish(&self.readiness, self.statuses.readiness());
        self.publish_counts(self.statuses.counts());
    }

    fn publish_counts(&self, counts: WorkerCounts) {
        for state in WorkerState::ALL {
            let count = counts.get(&state).copied().unwrap_or(0);
            self.telemetry.workers(state).set(f64::from(count));
        }
        publish(&self.workers, counts);
    }

    fn submit_placements(&self, placements: Vec<Placement<Assignment>>) {
        for Placement {
            worker,
            generation,
            job,
        } in placements
        {
            let handle = self.handles.get(&worker);
            if handle.is_none_or(|handle| handle.submit(generation, job).is_err()) {
                // Dropping the job closes its token channel. The stream then treats the worker as lost.
                tracing::debug!(
                    worker = worker.0,
                    "a worker's queue did not accept a sequence"
                );
            }
        }
    }

    /// Fails the waiting jobs and stops the workers.
    fn stop(&mut self) {
        for waiting in self.plan.clear() {
            waiting.token_channel.fail(Failure::Draining);
        }
        // The workers are stopping, so the metrics no longer count them in any state.
        self.publish_counts(WorkerCounts::new());
        for worker in self.handles.values() {
            worker.stop();
        }
        self.update_queue_gauge();
    }

    /// Updates the gauge of queued requests.
    fn update_queue_gauge(&self) {
        let queued = u32::try_from(self.plan.queued()).unwrap_or(u32::MAX);
        self.telemetry.requests_queued.set(f64::from(queued));
    }
}

/// Returns the result of an admission, as the submitter sees it.
fn result_of(admission: Admission) -> Result<(), Error> {
    let (kind, message) = match admission {
        Admission::Admitted => return Ok(()),
        Admission::QueueFull => {
            let message = "The queue is full. Try again later.".to_owned();
            (ErrorKind::QueueFull, message)
        }
        Admission::NoWorker => {
            let message = "No worker of this model is up. Try again later.".to_owned();
            (ErrorKind::NoWorker, message)
        }
        Admission::DeadlineTooEarly {
            estimated_wait,
            left,
        } => {
            let [wait, left] = [estimated_wait, left].map(|time| time.as_secs_f64());
            let message = format!(
                "The request would wait for about {wait:.1} s, behind other requests of the same caller, but its \
                 deadline is in {left:.1} s. Try again later, or with a longer timeout."
            );
            (ErrorKind::DeadlineExceeded, message)
        }
    };
    Err(Error::new(kind, message))
}

fn log_ready(worker: WorkerId, model: &str, served: &ServedModel) {
    let slots = served.slots;
    match &served.model.facts().device {
        Some(DeviceFacts { name, slot_bytes }) => {
            tracing::info!(worker = worker.0, model, device = %name, slots, slot_bytes, "a worker is ready");
        }
        None => tracing::info!(worker = worker.0, model, slots, "a worker is ready"),
    }
}

/// Sends a new value to the watchers, unless it equals the current value.
fn publish<T: PartialEq>(watched: &watch::Sender<T>, now: T) {
    watched.send_if_modified(|known| {
        let changed = *known != now;
        *known = now;
        changed
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn an_expired_job_is_wanted_until_its_reader_is_dropped() {
        let deadline = Instant::now() - Duration::from_secs(1);
        let (job, receiver) = Assignment::for_test(1, deadline);
        // The worker fails an expired job with `deadline_exceeded`. If the scheduler dropped the job here, its stream
        // would report a lost worker.
        assert!(job.has_reader());
        drop(receiver);
        assert!(!job.has_reader());
    }
}
