//! Assembles an engine: the scheduler, and the threads and processes of its local workers.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::critical::CriticalTasks;
use crate::listen::{Address, ServerTls};
use crate::models::{ModelId, ModelSpec, Models, UnknownModelPolicy};
use crate::runner::Loader;
use crate::scheduler::{LocalWorker, ResumptionLimits, Scheduler, SchedulerParts};
use crate::telemetry::Telemetry;
use crate::worker::attached::{
    AttachParts, AttachService, AttachableModel, TOKENIZER_CALL_TIMEOUT, WorkerTimeouts,
};
use crate::worker::child::{ChildSpec, Program, supervise};
use crate::worker::device_thread::DeviceThread;
use crate::worker::thread::{SpawnOptions, SpawnedWorker, spawn};
use crate::worker::{WorkerEvent, WorkerHandle, WorkerId};

/// Capacity of the channel that carries worker events to the scheduler. The scheduler never waits while it handles
/// events, so a small queue is enough.
const WORKER_EVENT_CAPACITY: usize = 1024;

/// Interval at which the engine checks for device calls that exceed the step limit.
const STEP_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Settings of an engine: its models and its workers.
#[derive(Clone)]
pub struct EngineParts {
    /// The models, in the order in which `/v1/models` lists them. Names and aliases must be unique.
    pub models: Vec<ModelParts>,
    /// Reaction to a request for an unknown model: reject it, or use the first model.
    pub unknown_model: UnknownModelPolicy,
    /// Settings of the workers, such as timeouts.
    pub workers: WorkerParts,
}

/// Settings of an engine's workers.
#[derive(Clone)]
pub struct WorkerParts {
    /// Address on which the engine accepts remote workers. With `None`, only the worker processes that the engine
    /// starts can connect.
    pub listen: Option<Address>,
    /// Mutual TLS for remote workers over TCP.
    pub tls: Option<ServerTls>,
    /// Timeouts of workers: heartbeat, device calls and tokenizer calls.
    pub timeouts: WorkerTimeouts,
    /// Limits on resuming a choice after its workers were lost.
    pub resumption: ResumptionLimits,
}

impl Default for WorkerParts {
    /// Returns the defaults: no address for remote workers, a heartbeat timeout of 2 s and a step limit of 30 s.
    fn default() -> Self {
        Self {
            listen: None,
            tls: None,
            timeouts: WorkerTimeouts {
                heartbeat_timeout: Duration::from_secs(2),
                step_limit: Some(Duration::from_secs(30)),
                tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
            },
            resumption: ResumptionLimits::default(),
        }
    }
}

/// Isolation of a model's local workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Workers run on threads of the engine.
    Thread,
    /// Each worker runs in a process of its own.
    Process(Program),
}

/// Settings of one model and its workers.
#[derive(Clone)]
pub struct ModelParts {
    /// Name of the model in requests.
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// Loader of the model. Each worker loads it once.
    pub loader: Arc<dyn Loader>,
    /// Number of local workers.
    pub workers: usize,
    /// Isolation of the local workers.
    pub isolation: Isolation,
    /// Number of sequences that each local worker runs at once.
    pub slots: usize,
    /// Maximum number of requests for the model that wait for a slot.
    pub queue_depth: usize,
    /// Maximum time for which a client may read nothing of its stream.
    pub slow_reader_timeout: Duration,
}

/// A running engine. Dropping it stops its workers and joins their threads.
pub(super) struct Engine {
    pub(super) models: Models,
    pub(super) scheduler: Arc<Scheduler>,
    /// The gRPC service to which worker processes connect.
    pub(super) attach_service: AttachService,
    threads: Vec<DeviceThread>,
    /// Cancelled to stop the child processes and the tasks that watch workers.
    stopping: CancellationToken,
    children: TaskTracker,
}

impl Engine {
    /// Starts the workers, which load their models in the background. Worker processes connect to `worker_socket`.
    pub(super) fn start(
        parts: &EngineParts,
        worker_socket: Option<&Address>,
        telemetry: &Telemetry,
        critical: &CriticalTasks,
    ) -> std::io::Result<Self> {
        let models = model_registry(&parts.models, parts.unknown_model);
        let model_parts = models.map_values(&parts.models);
        let (events_sender, events) = mpsc::channel(WORKER_EVENT_CAPACITY);
        let local_workers = parts.models.iter().map(|model| model.workers).sum();
        let attach_service = AttachService::new(AttachParts {
            models: model_parts.clone().map(|_, model| attachable_model(model)),
            first_worker: local_workers,
            timeouts: parts.workers.timeouts,
            events: events_sender.clone(),
            telemetry: telemetry.clone(),
            tasks: critical.tracker().clone(),
        });
        let children = TaskTracker::new();
        let mut starter = WorkerStarter {
            step_limit: parts.workers.timeouts.step_limit,
            worker_socket,
            telemetry,
            critical: critical.with_tracker(children.clone()),
            events: events_sender,
            attach_service: attach_service.clone(),
            workers: Vec::new(),
            threads: Vec::new(),
            stopping: CancellationToken::new(),
        };
        for (id, model) in model_parts.iter() {
            for device in 0..model.workers {
                starter.start(id, model, device)?;
            }
        }
        let (scheduler, task) = Scheduler::new(SchedulerParts {
            models: models.clone(),
            workers: starter.workers,
            events,
            queue_depths: model_parts.map(|_, model| model.queue_depth),
            resumption: parts.workers.resumption,
            telemetry: telemetry.clone(),
        });
        critical.spawn("scheduler", task);
        Ok(Self {
            models,
            scheduler,
            attach_service,
            threads: starter.threads,
            stopping: starter.stopping,
            children,
        })
    }

    /// Stops the workers, waits until every worker process has exited, and then waits up to `max_wait` for the device
    /// threads. A hung device call cannot be interrupted.
    pub(super) async fn join(mut self, max_wait: Duration) {
        self.stopping.cancel();
        self.children.close();
        self.children.wait().await;
        let threads = std::mem::take(&mut self.threads);
        let deadline = Instant::now() + max_wait;
        let joined = tokio::task::spawn_blocking(move || join_until(threads, deadline));
        // `join_until` does not panic, so the blocking task cannot fail.
        let _ = joined.await;
    }

    /// Stops every worker without waiting for them. The process must then exit through [`crate::exit`].
    pub(super) fn abandon(mut self) {
        for thread in std::mem::take(&mut self.threads) {
            thread.abandon();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stopping.cancel();
        self.scheduler.stop();
        // Dropping a thread joins it. Ask all threads to stop before the first join, so that they stop at the same
        // time.
        for thread in &self.threads {
            thread.stop();
        }
    }
}

/// Joins device threads until the deadline. A thread that is still in a device call is abandoned.
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

/// Starts the local workers of an engine one by one, and collects their handles.
struct WorkerStarter<'a> {
    /// Maximum duration of one device call.
    step_limit: Option<Duration>,
    worker_socket: Option<&'a Address>,
    telemetry: &'a Telemetry,
    critical: CriticalTasks,
    events: mpsc::Sender<WorkerEvent>,
    attach_service: AttachService,
    workers: Vec<LocalWorker>,
    threads: Vec<DeviceThread>,
    stopping: CancellationToken,
}

impl WorkerStarter<'_> {
    fn start(&mut self, id: ModelId, model: &ModelParts, device: usize) -> std::io::Result<()> {
        let worker = WorkerId(self.workers.len());
        let handle = match &model.isolation {
            Isolation::Thread => {
                let SpawnedWorker { handle, thread } = spawn(SpawnOptions {
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
                    let stopping = self.stopping.clone();
                    self.critical.spawn("device watch", async move {
                        stopping.run_until_cancelled_owned(watched).await;
                    });
                }
                Some(handle)
            }
            Isolation::Process(program) => {
                let socket = self.worker_socket.ok_or_else(|| {
                    std::io::Error::other(
                        "worker processes need a worker socket, but the engine has none",
                    )
                })?;
                let spec = ChildSpec {
                    worker,
                    model: id,
                    model_name: model.name.clone(),
                    device,
                    engine: socket.to_string(),
                };
                let supervised = supervise(
                    program.clone(),
                    spec,
                    self.attach_service.clone(),
                    self.events.clone(),
                    self.stopping.clone(),
                );
                self.critical.spawn("worker process", supervised);
                None
            }
        };
        self.workers.push(LocalWorker {
            worker,
            model: id,
            handle,
        });
        Ok(())
    }
}

/// Tells the scheduler when a device call on a thread exceeds the step limit, and when the call has returned. A
/// device call cannot be interrupted, so the scheduler only stops giving sequences to that worker.
async fn watch_steps(
    worker: WorkerId,
    handle: WorkerHandle,
    limit: Duration,
    events: mpsc::Sender<WorkerEvent>,
) {
    let mut was_stuck = false;
    let mut checks = interval(STEP_CHECK_INTERVAL.min(limit));
    loop {
        checks.tick().await;
        let is_stuck = handle.step_duration() > limit;
        if is_stuck != was_stuck {
            was_stuck = is_stuck;
            if events
                .send(WorkerEvent::Stuck { worker, is_stuck })
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

fn attachable_model(model: &ModelParts) -> AttachableModel {
    AttachableModel {
        name: model.name.clone(),
        aliases: model.aliases.clone(),
        slow_reader_timeout: model.slow_reader_timeout,
    }
}

/// Creates the registry of an engine's models.
fn model_registry(models: &[ModelParts], unknown: UnknownModelPolicy) -> Models {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let created = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
    let specs = models.iter().map(|model| ModelSpec {
        name: model.name.clone(),
        aliases: model.aliases.clone(),
        runner: model.loader.name(),
        created,
    });
    Models::new(specs.collect(), unknown)
}
