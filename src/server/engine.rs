//! Puts an engine together: its workers' threads and processes, and the scheduler before them.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::critical::CriticalTasks;
use crate::listen::{Address, MutualTls};
use crate::runner::Loader;
use crate::scheduler::{
    Catalog, CatalogEntry, OwnedWorker, ResumptionLimits, Scheduler, SchedulerParts, UnknownModel,
};
use crate::telemetry::Telemetry;
use crate::worker::attached::{
    AttachService, AttachableModel, TOKENIZER_CALL_TIMEOUT, WorkerTimeouts,
};
use crate::worker::child::{ChildSpec, Program, supervise};
use crate::worker::device_thread::DeviceThread;
use crate::worker::thread::{SpawnOptions, spawn};
use crate::worker::{WorkerEvent, WorkerHandle, WorkerId};

/// How many events of workers may wait for the scheduler, which takes them without delay.
const WORKER_EVENT_CAPACITY: usize = 1024;

/// How often a worker's device is looked at, whether it returns.
const STEP_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The models of an engine and how it runs them.
#[derive(Clone)]
pub struct EngineParts {
    /// The models, in the order in which they are listed. No name or alias is given twice.
    pub models: Vec<ModelParts>,
    /// What happens to a request for a model that is not among them.
    pub unknown_model: UnknownModel,
    /// How it deals with its workers.
    pub workers: WorkerParts,
}

/// How an engine deals with its workers.
#[derive(Clone)]
pub struct WorkerParts {
    /// Where workers dial in; `None` where none may, but those that the engine starts itself.
    pub listen: Option<Address>,
    /// What they have to show there, and are shown.
    pub tls: Option<MutualTls>,
    /// How long it waits for them.
    pub patience: WorkerTimeouts,
    /// How far a choice is followed whose workers are lost.
    pub resumption: ResumptionLimits,
}

impl Default for WorkerParts {
    /// No socket; heartbeats within 2 s, steps within 30 s.
    fn default() -> Self {
        Self {
            listen: None,
            tls: None,
            patience: WorkerTimeouts {
                heartbeat_timeout: Duration::from_secs(2),
                step_limit: Some(Duration::from_secs(30)),
                tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
            },
            resumption: ResumptionLimits::default(),
        }
    }
}

/// Where a model's workers run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// On threads of the engine.
    Thread,
    /// Each in a process of its own.
    Process(Program),
}

/// One model and its workers.
#[derive(Clone)]
pub struct ModelParts {
    /// The name that requests give.
    pub name: String,
    /// Other names that requests may give.
    pub aliases: Vec<String>,
    /// Loads it, once for each worker.
    pub loader: Arc<dyn Loader>,
    /// How many workers of the engine's own run it.
    pub workers: usize,
    /// Where these run.
    pub isolation: Isolation,
    /// How many sequences each of them runs at once.
    pub slots: usize,
    /// The most of its requests that may wait for a first slot.
    pub queue_depth: usize,
    /// How long a reader of it may make no progress.
    pub slow_reader_timeout: Duration,
}

/// An engine that runs. When it is dropped, its workers are stopped and their threads joined.
pub(super) struct Engine {
    pub(super) scheduler: Scheduler,
    /// Where workers dial in.
    pub(super) door: AttachService,
    threads: Vec<DeviceThread>,
    /// The children's processes, and what watches workers, are to end.
    ending: CancellationToken,
    children: TaskTracker,
}

impl Engine {
    /// Starts the workers, which load their models in the background. Those in processes of their own dial in at
    /// `worker_socket`.
    pub(super) fn start(
        parts: &EngineParts,
        worker_socket: Option<&Address>,
        telemetry: &Telemetry,
        (tasks, critical): (&TaskTracker, &CriticalTasks),
    ) -> std::io::Result<Self> {
        let (events_sender, events) = mpsc::channel(WORKER_EVENT_CAPACITY);
        let own = parts.models.iter().map(|model| model.workers).sum();
        let door = AttachService::new(
            parts.models.iter().map(offered).collect(),
            own,
            parts.workers.patience,
            events_sender.clone(),
            (telemetry.clone(), tasks.clone()),
        );
        let mut starting = WorkerStarter {
            step_limit: parts.workers.patience.step_limit,
            engine: worker_socket,
            telemetry,
            critical,
            events: events_sender,
            door: door.clone(),
            workers: Vec::new(),
            threads: Vec::new(),
            ending: CancellationToken::new(),
            children: TaskTracker::new(),
        };
        for (place, model) in parts.models.iter().enumerate() {
            for device in 0..model.workers {
                starting.start(place, model, device)?;
            }
        }
        let (scheduler, task) = Scheduler::new(SchedulerParts {
            catalog: catalog(&parts.models).with_unknown_model(parts.unknown_model),
            workers: starting.workers,
            events,
            queue_depths: parts.models.iter().map(|model| model.queue_depth).collect(),
            resumption: parts.workers.resumption,
            telemetry: telemetry.clone(),
        });
        critical.spawn(tasks, "scheduler", task);
        Ok(Self {
            scheduler,
            door,
            threads: starting.threads,
            ending: starting.ending,
            children: starting.children,
        })
    }

    /// Waits until every worker's process has ended, and every thread, or `at_most` so long: a device call that hangs
    /// cannot be interrupted.
    pub(super) async fn join(mut self, at_most: Duration) {
        self.ending.cancel();
        self.children.close();
        self.children.wait().await;
        let threads = std::mem::take(&mut self.threads);
        let deadline = Instant::now() + at_most;
        let joined = tokio::task::spawn_blocking(move || join_until(threads, deadline));
        // It contains no panic of its own.
        let _ = joined.await;
    }

    /// Stops every worker, and waits for none. The process must then leave by [`crate::exit`].
    pub(super) fn abandon(mut self) {
        for thread in std::mem::take(&mut self.threads) {
            thread.abandon();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.ending.cancel();
        self.scheduler.stop();
        // All of them end at once, and then each is waited for.
        for thread in &self.threads {
            thread.stop();
        }
    }
}

/// Stops and joins threads. Those that do not end in time are abandoned.
fn join_until(threads: Vec<DeviceThread>, deadline: Instant) {
    for thread in &threads {
        thread.stop();
    }
    for mut thread in threads {
        if !thread.join_until(deadline) {
            tracing::warn!("a device call did not return; its worker is abandoned");
            thread.abandon();
        }
    }
}

/// An engine's own workers, as they are started.
struct WorkerStarter<'a> {
    /// How long one call of a device may last.
    step_limit: Option<Duration>,
    engine: Option<&'a Address>,
    telemetry: &'a Telemetry,
    critical: &'a CriticalTasks,
    events: mpsc::Sender<WorkerEvent>,
    door: AttachService,
    workers: Vec<OwnedWorker>,
    threads: Vec<DeviceThread>,
    ending: CancellationToken,
    children: TaskTracker,
}

impl WorkerStarter<'_> {
    fn start(&mut self, place: usize, model: &ModelParts, device: usize) -> std::io::Result<()> {
        let worker = WorkerId(self.workers.len());
        let handle = match &model.isolation {
            Isolation::Thread => {
                let (handle, thread) = spawn(SpawnOptions {
                    id: worker,
                    loader: Arc::clone(&model.loader),
                    slots: model.slots,
                    slow_reader_timeout: model.slow_reader_timeout,
                    events: self.events.clone(),
                    telemetry: self.telemetry.clone(),
                    after_step: None,
                })?;
                self.threads.push(thread);
                if let Some(limit) = self.step_limit {
                    let watched = watch_steps(worker, handle.clone(), limit, self.events.clone());
                    let ending = self.ending.clone();
                    self.critical
                        .spawn(&self.children, "device watch", async move {
                            ending.run_until_cancelled_owned(watched).await;
                        });
                }
                Some(handle)
            }
            Isolation::Process(program) => {
                let engine = self.engine.ok_or_else(|| {
                    std::io::Error::other("there is no worker socket for its processes")
                })?;
                let place = ChildSpec {
                    worker,
                    model: (place, model.name.clone()),
                    device,
                    engine: engine.to_string(),
                };
                let supervised = supervise(
                    program.clone(),
                    place,
                    self.door.clone(),
                    self.events.clone(),
                    self.ending.clone(),
                );
                self.critical
                    .spawn(&self.children, "worker process", supervised);
                None
            }
        };
        self.workers.push(OwnedWorker {
            worker,
            model: place,
            handle,
        });
        Ok(())
    }
}

/// Tells of a device on a thread whose call takes too long: it cannot be ended, but it need not be given more.
async fn watch_steps(
    worker: WorkerId,
    handle: WorkerHandle,
    limit: Duration,
    events: mpsc::Sender<WorkerEvent>,
) {
    let mut was_stuck = false;
    let mut looks = interval(STEP_CHECK_INTERVAL.min(limit));
    loop {
        looks.tick().await;
        let is_stuck = handle.step_duration() > limit;
        if is_stuck != was_stuck {
            was_stuck = is_stuck;
            if events
                .send(WorkerEvent::Stuck(worker, is_stuck))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

fn offered(model: &ModelParts) -> AttachableModel {
    AttachableModel {
        name: model.name.clone(),
        aliases: model.aliases.clone(),
        slow_reader_timeout: model.slow_reader_timeout,
    }
}

fn catalog(models: &[ModelParts]) -> Catalog {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let created = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
    let entry = |model: &ModelParts| {
        let runner = model.loader.name();
        CatalogEntry::new(&model.name, &model.aliases, runner, created)
    };
    Catalog::new(models.iter().map(entry).collect())
}
