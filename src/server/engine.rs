//! Puts an engine together: its workers' threads and the scheduler before them.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::runner::Loader;
use crate::scheduler::{Catalog, CatalogEntry, Parts, Scheduler};
use crate::telemetry::Telemetry;
use crate::worker::WorkerId;
use crate::worker::thread::{Spawn, spawn};

/// How many events of workers may wait for the scheduler, which takes them without delay.
const EVENTS: usize = 1024;

/// The models of an engine and how it runs them.
#[derive(Clone)]
pub struct EngineParts {
    /// The models, in the order in which they are listed. No name or alias is given twice.
    pub models: Vec<ModelParts>,
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
    /// How many workers run it.
    pub workers: usize,
    /// How many sequences each of them runs at once.
    pub slots: usize,
    /// The most of its requests that may wait for a first slot.
    pub queue_depth: usize,
    /// How long a reader of it may make no progress.
    pub slow_reader_timeout: Duration,
}

/// An engine that runs.
pub(super) struct Engine {
    pub(super) scheduler: Scheduler,
    threads: Vec<JoinHandle<()>>,
}

impl Engine {
    /// Starts the workers, which load their models in the background.
    pub(super) fn start(
        parts: &EngineParts,
        telemetry: &Telemetry,
        tasks: &TaskTracker,
    ) -> std::io::Result<Self> {
        let (sender, events) = mpsc::channel(EVENTS);
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for (index, model) in parts.models.iter().enumerate() {
            for _ in 0..model.workers {
                let (handle, thread) = spawn(Spawn {
                    id: WorkerId(workers.len()),
                    loader: Arc::clone(&model.loader),
                    slots: model.slots,
                    slow_reader_timeout: model.slow_reader_timeout,
                    events: sender.clone(),
                    telemetry: telemetry.clone(),
                })?;
                workers.push((handle, index, model.slots));
                threads.push(thread);
            }
        }
        let (scheduler, task) = Scheduler::new(Parts {
            catalog: catalog(&parts.models),
            workers,
            events,
            queue_depths: parts.models.iter().map(|model| model.queue_depth).collect(),
            telemetry: telemetry.clone(),
        });
        tasks.spawn(task);
        Ok(Self { scheduler, threads })
    }

    /// Waits until every worker's thread has ended, or `at_most` so long: a device call that hangs
    /// cannot be interrupted.
    pub(super) async fn join(self, at_most: Duration) {
        let threads = self.threads;
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                // A worker contains its runner's panics; its own would be told by the hook.
                let _ = thread.join();
            }
        });
        if tokio::time::timeout(at_most, joined).await.is_err() {
            tracing::warn!("a device call did not return; its worker is abandoned");
        }
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
