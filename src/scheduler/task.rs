//! The task that owns the plan: it hears of new requests, of workers, and of those who went away.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::plan::{Admission, Job, Placement, Plan};
use super::readiness::{Readiness, WorkerStatus, WorkerStatuses};
use super::{Catalog, SchedulerParts, Submission, Work};
use crate::error::{Error, ErrorKind};
use crate::telemetry::{Telemetry, WorkerCounts, WorkerState};
use crate::worker::token_channel::Failure;
use crate::worker::{Assignment, WorkerEvent, WorkerHandle, WorkerId};

/// What the task is told without a message.
pub(super) struct Signals {
    /// Somebody who waited has gone.
    pub(super) abandoned: Arc<Notify>,
    /// Everything is to end.
    pub(super) stopping: CancellationToken,
}

/// Runs until it is stopped, or every handle is gone.
pub(super) async fn run(
    parts: SchedulerParts,
    mut submissions: mpsc::Receiver<Submission>,
    signals: Signals,
    (readiness, workers): (watch::Sender<Readiness>, watch::Sender<WorkerCounts>),
) {
    let mut events = parts.events;
    let names = parts.catalog.entries().iter();
    let names = names.map(|entry| Arc::clone(&entry.name)).collect();
    let mut task = Task {
        plan: Plan::new(&parts.queue_depths),
        statuses: WorkerStatuses::new(names),
        handles: HashMap::new(),
        catalog: parts.catalog,
        telemetry: parts.telemetry,
        readiness,
        workers,
    };
    for own in parts.workers {
        task.joined(own.worker, own.model, own.handle);
    }
    task.publish_readiness();
    loop {
        tokio::select! {
            // A place that was given up before a request came is there for it.
            biased;
            () = signals.stopping.cancelled() => break,
            () = signals.abandoned.notified() => task.plan.sweep(),
            Some(event) = events.recv() => task.handle_event(event),
            submission = submissions.recv() => match submission {
                Some(submission) => task.submit(submission),
                None => break,
            },
        }
        task.count();
    }
    task.stop();
    // The workers tell of what they give up until they end, and wait for whoever listens.
    while events.recv().await.is_some() {}
}

struct Task {
    plan: Plan<Assignment>,
    handles: HashMap<WorkerId, WorkerHandle>,
    statuses: WorkerStatuses,
    catalog: Catalog,
    telemetry: Telemetry,
    readiness: watch::Sender<Readiness>,
    workers: watch::Sender<WorkerCounts>,
}

impl Job for Assignment {
    fn max_tokens(&self) -> u32 {
        self.sequence.max_tokens
    }

    fn is_wanted(&self) -> bool {
        // One past its deadline is placed all the same: its worker says so, and never steps it.
        !self.token_channel.is_closed()
    }

    fn is_suspect(&self) -> bool {
        self.is_suspect
    }
}

impl Task {
    fn joined(&mut self, worker: WorkerId, model: usize, handle: Option<WorkerHandle>) {
        self.plan.joined(worker, model);
        self.statuses.joined(worker, model);
        self.handles.extend(handle.map(|handle| (worker, handle)));
    }

    fn submit(&mut self, submission: Submission) {
        let Submission {
            model,
            priority,
            work,
        } = submission;
        let (choices, admitted) = match work {
            Work::New { choices, admitted } => (choices, admitted),
            Work::Resumed(choice) => {
                let placements = self.plan.resume(model, priority, *choice);
                return self.start(placements);
            }
        };
        let (admission, placements) = self.plan.admit(model, priority, choices);
        let answer = match admission {
            Admission::Admitted => Ok(()),
            Admission::QueueFull => Err(Error::new(
                ErrorKind::QueueFull,
                "The queue is full. Try again later.",
            )),
            Admission::NoWorker => Err(Error::new(
                ErrorKind::NoWorker,
                "No worker of this model is up. Try again later.",
            )),
        };
        // Whoever asked may have gone; then its lanes are closed and nothing is run for it.
        let _ = admitted.send(answer);
        self.start(placements);
    }

    fn handle_event(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Joined(worker, model, handle) => {
                self.joined(worker, model, Some(handle));
                self.publish_readiness();
            }
            WorkerEvent::Loading(worker, fraction) => {
                self.statuses.loading(worker, fraction);
                self.publish_readiness();
            }
            WorkerEvent::Ready(worker, generation, served) => {
                let Some((at, _)) = self.statuses.model_of(worker) else {
                    return;
                };
                self.catalog.entries()[at].loaded(served.model);
                self.statuses.set(worker, WorkerStatus::Up);
                let placements = self.plan.ready(worker, generation, served.slots);
                self.start(placements);
                self.publish_readiness();
            }
            WorkerEvent::Stuck(worker, is_stuck) => {
                let model = self.model_of(worker);
                if is_stuck {
                    tracing::error!(
                        worker = worker.0,
                        model,
                        "a call of the device does not return; it cannot be ended here"
                    );
                } else {
                    tracing::warn!(
                        worker = worker.0,
                        model,
                        "the call of the device has returned"
                    );
                }
                let ability = if is_stuck {
                    WorkerStatus::Lost
                } else {
                    WorkerStatus::Up
                };
                self.statuses.set(worker, ability);
                let placements = self.plan.stuck(worker, is_stuck);
                self.start(placements);
                self.publish_readiness();
            }
            WorkerEvent::SuspectCleared(worker, generation) => {
                let placements = self.plan.cleared(worker, generation);
                self.start(placements);
            }
            WorkerEvent::Released(worker, generation, max_tokens) => {
                let placements = self.plan.released(worker, generation, max_tokens);
                self.start(placements);
            }
            WorkerEvent::Lost(worker, reason) => {
                let model = self.model_of(worker);
                tracing::error!(worker = worker.0, model, %reason, "a worker was lost; it is restarted");
                self.down(worker, WorkerStatus::Lost);
            }
            WorkerEvent::LoadFailed(worker, reason) => {
                let model = self.model_of(worker);
                tracing::error!(worker = worker.0, model, %reason, "a worker could not load its model");
                self.down(worker, WorkerStatus::LoadFailed(reason));
            }
            WorkerEvent::GivenUp(worker, reason) => {
                let model = self.model_of(worker);
                tracing::error!(worker = worker.0, model, %reason, "a worker is given up");
                self.down(worker, WorkerStatus::GivenUp(reason));
            }
            WorkerEvent::Left(worker, reason) => {
                let model = self.model_of(worker);
                tracing::warn!(worker = worker.0, model, %reason, "a worker has left");
                self.plan.left(worker);
                self.statuses.left(worker);
                self.handles.remove(&worker);
                self.publish_readiness();
            }
        }
    }

    fn model_of(&self, worker: WorkerId) -> &str {
        self.statuses.model_of(worker).map_or("", |(_, name)| name)
    }

    fn down(&mut self, worker: WorkerId, ability: WorkerStatus) {
        self.statuses.set(worker, ability);
        self.plan.lost(worker);
        self.publish_readiness();
    }

    fn publish_readiness(&self) {
        tell(&self.readiness, self.statuses.readiness());
        self.publish_counts(self.statuses.counts());
    }

    fn publish_counts(&self, counts: WorkerCounts) {
        for state in WorkerState::ALL {
            let count = counts.get(&state).copied().unwrap_or(0);
            self.telemetry.workers(state).set(f64::from(count));
        }
        tell(&self.workers, counts);
    }

    fn start(&self, placements: Vec<Placement<Assignment>>) {
        for Placement {
            worker,
            generation,
            job,
        } in placements
        {
            let handle = self.handles.get(&worker);
            if handle.is_none_or(|handle| handle.submit(generation, job).is_err()) {
                // Its token_channel closes with it, so its stream learns that it was lost. The worker has just gone.
                tracing::debug!(worker = worker.0, "a worker took no more work");
            }
        }
    }

    /// Ends what waits and what runs.
    fn stop(&mut self) {
        for waiting in self.plan.clear() {
            waiting.token_channel.fail(Failure::Draining);
        }
        // Whether a worker that ends was up or not is of no interest any more.
        self.publish_counts(WorkerCounts::new());
        for worker in self.handles.values() {
            worker.stop();
        }
        self.count();
    }

    fn count(&self) {
        let queued = u32::try_from(self.plan.queued()).unwrap_or(u32::MAX);
        self.telemetry.queue_depth.set(f64::from(queued));
    }
}

/// Tells what is new.
fn tell<T: PartialEq>(watched: &watch::Sender<T>, now: T) {
    watched.send_if_modified(|known| {
        let changed = *known != now;
        *known = now;
        changed
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use metrics::Counter;
    use tokio::time::Instant;

    use super::*;
    use crate::request::{Caller, Sampling, StopTokens};
    use crate::runner::Sequence;
    use crate::worker::token_channel::token_channel;

    #[tokio::test]
    async fn an_expired_job_is_wanted_until_its_reader_is_dropped() {
        let (sender, receiver) = token_channel(1, Arc::new(Notify::new()), Counter::noop());
        let sequence = Sequence {
            prompt: [0].into(),
            delivered: Vec::new(),
            choice: 0,
            seed: 0,
            max_tokens: 1,
            sampling: Sampling::default(),
            logit_bias: [].into(),
            stop_tokens: StopTokens::default(),
            logprobs: None,
            scores_prompt: false,
            timestamps: false,
            caller: Caller::default(),
        };
        let job = Assignment {
            sequence,
            token_channel: sender,
            is_suspect: false,
            deadline: Instant::now() - Duration::from_secs(1),
        };
        // Its worker tells it why it is not run. Dropped here, it would be taken for lost.
        assert!(job.is_wanted());
        drop(receiver);
        assert!(!job.is_wanted());
    }
}
