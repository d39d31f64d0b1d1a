//! A worker on a thread of this process. It loads the model, runs the step loop of its device, and loads the model
//! again after a crash.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::device_thread::DeviceThread;
use super::{Flags, Generation, ServedModel, Submission, WorkerEvent, WorkerHandle, WorkerId};
use crate::backoff::{Backoff, BackoffPolicy};
use crate::critical::panic_message;
use crate::runner::{LoadedModel, Loader};
use crate::telemetry::Telemetry;
use step_loop::Device;

mod step_loop;
#[cfg(test)]
mod tests;

/// Delays before a crashed worker loads its model again.
const RELOAD_BACKOFF: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    max: Duration::from_secs(10),
    jitter: 0.5,
};

/// If a worker ran for longer than this before it crashed, the next delay is the first one again.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// Parameters of [`spawn`].
pub struct SpawnOptions {
    /// The worker's id.
    pub id: WorkerId,
    /// Loads the model.
    pub loader: Arc<dyn Loader>,
    /// Number of sequences that the worker runs at once.
    pub slots: usize,
    /// Maximum time for which a reader may leave its full token channel unread.
    pub slow_reader_timeout: Duration,
    /// Receives the worker's events.
    pub events: mpsc::Sender<WorkerEvent>,
    /// The metrics that the worker updates.
    pub telemetry: Telemetry,
    /// Function to call after each step. A worker process sends the step's tokens to its engine there.
    pub after_step: Option<Box<dyn Fn() + Send>>,
}

/// A worker whose thread has been started.
pub struct SpawnedWorker {
    /// Submits sequences to the worker.
    pub handle: WorkerHandle,
    /// Stops and joins the worker's thread.
    pub thread: DeviceThread,
}

/// Starts the thread of a worker. The thread ends when the worker is drained or stopped, or when the receiver of its
/// events is dropped.
///
/// # Errors
/// Returns an error if the system cannot start another thread.
pub fn spawn(options: SpawnOptions) -> std::io::Result<SpawnedWorker> {
    // The scheduler never submits more sequences to a worker than the worker has slots.
    let (commands, receiver) = mpsc::channel(options.slots + 1);
    let flags = Arc::new(Flags::default());
    let worker = Worker {
        options,
        commands: receiver,
        flags: Arc::clone(&flags),
        generation: Generation(0),
    };
    let name = format!("worker-{}", worker.options.id.0);
    let thread = DeviceThread::spawn(name, flags, move || worker.run())?;
    let waker = thread.waker().clone();
    let handle = WorkerHandle { commands, waker };
    Ok(SpawnedWorker { handle, thread })
}

struct Worker {
    options: SpawnOptions,
    commands: mpsc::Receiver<Submission>,
    flags: Arc<Flags>,
    generation: Generation,
}

/// Reason why a generation of the worker ended.
enum GenerationEnd {
    /// The worker was stopped or drained, or the receiver of its events was dropped.
    Stopped,
    /// The model could not be loaded.
    LoadFailed(String),
    /// The device failed.
    Crashed(String),
}

impl Worker {
    fn run(mut self) {
        // With the kernel's default timer slack, the thread may wake up 50 µs late to save power.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut backoff = Backoff::new(RELOAD_BACKOFF);
        loop {
            self.generation.0 += 1;
            let started = Instant::now();
            let end = catch_unwind(AssertUnwindSafe(|| self.run_generation()))
                .unwrap_or_else(|panic| GenerationEnd::Crashed(runner_panic(&*panic)));
            if started.elapsed() > STABLE_AFTER {
                backoff.reset();
            }
            let event = match end {
                GenerationEnd::Stopped => return,
                GenerationEnd::LoadFailed(reason) => WorkerEvent::LoadFailed {
                    worker: self.options.id,
                    reason,
                },
                GenerationEnd::Crashed(reason) => {
                    self.options.telemetry.workers_lost.increment(1);
                    WorkerEvent::Lost {
                        worker: self.options.id,
                        reason,
                    }
                }
            };
            if !self.report(event) || !wait_backoff(backoff.next_delay(), || self.is_ending()) {
                return;
            }
        }
    }

    /// Loads the model, and runs its device until the worker stops or crashes.
    fn run_generation(&mut self) -> GenerationEnd {
        let id = self.options.id;
        let progress = |fraction: f32| {
            // Progress is only informative. If the queue is full, this report is dropped and the next one replaces
            // it.
            let _ = self.options.events.try_send(WorkerEvent::Loading {
                worker: id,
                fraction,
            });
        };
        let load = || self.options.loader.load(self.options.slots, &progress);
        // `AssertUnwindSafe` is sound here: the state of a load that panicked is not used again.
        let LoadedModel { model, runner } = match catch_unwind(AssertUnwindSafe(load)) {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => return GenerationEnd::LoadFailed(error.0),
            Err(panic) => return GenerationEnd::LoadFailed(runner_panic(&*panic)),
        };
        let slots = self.options.slots;
        // Until now, the flags describe the prefix cache of the generation before.
        self.flags.set_prefix_cache(runner.prefix_cache());
        if !self.report(WorkerEvent::Ready {
            worker: id,
            generation: self.generation,
            served: ServedModel { model, slots },
        }) {
            return GenerationEnd::Stopped;
        }
        match Device::new(self, runner).run() {
            Ok(()) => GenerationEnd::Stopped,
            Err(error) => GenerationEnd::Crashed(error.0),
        }
    }

    fn report(&self, event: WorkerEvent) -> bool {
        // This blocks only briefly: the scheduler never waits for a worker while it receives events.
        self.options.events.blocking_send(event).is_ok()
    }

    fn is_ending(&self) -> bool {
        self.flags.stopping.load(Ordering::SeqCst) || self.flags.draining.load(Ordering::SeqCst)
    }
}

/// Sleeps for `delay`. Checks `is_ending` after each unpark, and returns false as soon as it is true.
fn wait_backoff(delay: Duration, is_ending: impl Fn() -> bool) -> bool {
    let until = Instant::now() + delay;
    loop {
        if is_ending() {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::park_timeout(left);
    }
}

fn runner_panic(panic: &(dyn std::any::Any + Send)) -> String {
    format!("the runner panicked: {}", panic_message(panic))
}
