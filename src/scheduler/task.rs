//! The task that owns the plan: it hears of new requests, of workers, and of those who went away.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::plan::{Admission, Job, Placement, Plan};
use super::readiness::{Abilities, Ability, Readiness};
use super::{Catalog, Parts, Submission};
use crate::error::{Error, ErrorKind};
use crate::telemetry::Telemetry;
use crate::worker::lane::Failure;
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
    parts: Parts,
    mut submissions: mpsc::Receiver<Submission>,
    signals: Signals,
    readiness: watch::Sender<Readiness>,
) {
    let mut events = parts.events;
    let workers: Vec<_> = parts
        .workers
        .iter()
        .map(|(_, model, slots)| (*model, *slots))
        .collect();
    let models: Vec<_> = workers.iter().map(|(model, _)| *model).collect();
    let names = parts.catalog.entries().iter();
    let names = names.map(|entry| Arc::clone(&entry.name)).collect();
    let mut task = Task {
        plan: Plan::new(&parts.queue_depths, &workers),
        abilities: Abilities::new(names, &models),
        handles: parts
            .workers
            .into_iter()
            .map(|(handle, _, _)| handle)
            .collect(),
        catalog: parts.catalog,
        telemetry: parts.telemetry,
        readiness,
    };
    loop {
        tokio::select! {
            // A place that was given up before a request came is there for it.
            biased;
            () = signals.stopping.cancelled() => break,
            () = signals.abandoned.notified() => task.plan.sweep(),
            Some(event) = events.recv() => task.hear(event),
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
    handles: Vec<WorkerHandle>,
    abilities: Abilities,
    catalog: Catalog,
    telemetry: Telemetry,
    readiness: watch::Sender<Readiness>,
}

impl Job for Assignment {
    fn max_tokens(&self) -> u32 {
        self.sequence.max_tokens
    }

    fn is_wanted(&self) -> bool {
        // One past its deadline is placed all the same: its worker says so, and never steps it.
        !self.lane.is_closed()
    }
}

impl Task {
    fn submit(&mut self, submission: Submission) {
        let Submission {
            model,
            priority,
            choices,
            admitted,
        } = submission;
        let (admission, placements) = self.plan.admit(model, priority, choices);
        let answer = match admission {
            Admission::Admitted => Ok(()),
            Admission::QueueFull => Err(Error::new(
                ErrorKind::QueueFull,
                "The queue is full. Try again later.",
            )),
            Admission::NoWorker => Err(Error::new(
                ErrorKind::NoWorker,
                "No worker of this model is up. They are being restarted.",
            )),
        };
        // Whoever asked may have gone; then its lanes are closed and nothing is run for it.
        let _ = admitted.send(answer);
        self.start(placements);
    }

    fn hear(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Loading(worker, fraction) => {
                self.abilities.loading(worker.0, fraction);
                self.tell_readiness();
            }
            WorkerEvent::Ready(worker, life, model) => {
                let (at, _) = self.abilities.model_of(worker.0);
                self.catalog.entries()[at].loaded(model);
                self.abilities.set(worker.0, Ability::Up);
                let placements = self.plan.ready(worker, life);
                self.start(placements);
                self.tell_readiness();
            }
            WorkerEvent::Released(worker, life, max_tokens) => {
                let placements = self.plan.released(worker, life, max_tokens);
                self.start(placements);
            }
            WorkerEvent::Lost(worker, reason) => {
                let (_, model) = self.abilities.model_of(worker.0);
                tracing::error!(worker = worker.0, model, %reason, "a worker crashed; it is restarted");
                self.down(worker, Ability::Lost);
            }
            WorkerEvent::LoadFailed(worker, reason) => {
                let (_, model) = self.abilities.model_of(worker.0);
                tracing::error!(worker = worker.0, model, %reason, "a worker could not load its model");
                self.down(worker, Ability::LoadFailed(reason));
            }
        }
    }

    fn down(&mut self, worker: WorkerId, ability: Ability) {
        self.abilities.set(worker.0, ability);
        self.plan.lost(worker);
        self.tell_readiness();
    }

    fn tell_readiness(&self) {
        let readiness = self.abilities.readiness();
        self.readiness.send_if_modified(|known| {
            let changed = *known != readiness;
            *known = readiness;
            changed
        });
    }

    fn start(&self, placements: Vec<Placement<Assignment>>) {
        for Placement { worker, life, job } in placements {
            if self.handles[worker.0].submit(life, job).is_err() {
                // Its lane closes with it, so its stream learns that it was lost.
                tracing::error!(
                    worker = worker.0,
                    "a worker took no more work than its slots"
                );
            }
        }
    }

    /// Ends what waits and what runs.
    fn stop(&mut self) {
        for waiting in self.plan.clear() {
            waiting.lane.fail(Failure::Draining);
        }
        for worker in &self.handles {
            worker.stop();
        }
        self.count();
    }

    fn count(&self) {
        let queued = u32::try_from(self.plan.queued()).unwrap_or(u32::MAX);
        self.telemetry.queue_depth.set(f64::from(queued));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use metrics::Counter;
    use tokio::time::Instant;

    use super::*;
    use crate::request::{Caller, Sampling, StopTokens};
    use crate::runner::Sequence;
    use crate::worker::lane::lane;

    #[tokio::test]
    async fn a_job_past_its_deadline_is_wanted_until_its_reader_goes() {
        let (sender, receiver) = lane(1, Arc::new(Notify::new()), Counter::noop());
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
            stamps: false,
            caller: Caller::default(),
        };
        let job = Assignment {
            sequence,
            lane: sender,
            deadline: Instant::now() - Duration::from_secs(1),
        };
        // Its worker tells it why it is not run. Dropped here, it would be taken for lost.
        assert!(job.is_wanted());
        drop(receiver);
        assert!(!job.is_wanted());
    }
}
