//! A worker on a thread of this process. It loads the model, calls the device step by step, and loads the model again
//! after a crash.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::device_thread::DeviceThread;
use super::slots::{FreedSlot, Slots};
use super::token_channel::{Failure, SendOutcome};
use super::{
    Assignment, Flags, Generation, ServedModel, Submission, WorkerEvent, WorkerHandle, WorkerId,
};
use crate::backoff::{Backoff, BackoffPolicy};
use crate::critical::panic_message;
use crate::logging::REQUEST_SPAN_TARGET;
use crate::request::FinishReason;
use crate::runner::{
    Emission, LoadedModel, Loader, NextStep, Runner, Sequence, SequenceStart, Slot, Step,
    StepError, Token, monotonic_ns,
};
use crate::telemetry::{PrefixCacheMeter, Telemetry};

#[cfg(test)]
mod tests;

/// Time in nanoseconds before a scheduled step at which the thread stops sleeping and spins. The kernel wakes a
/// sleeping thread tens of microseconds late.
const SPIN_NS: u64 = 50_000;

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
        if !self.report(WorkerEvent::Ready {
            worker: id,
            generation: self.generation,
            served: ServedModel { model, slots },
        }) {
            return GenerationEnd::Stopped;
        }
        let slow_reader_ns =
            u64::try_from(self.options.slow_reader_timeout.as_nanos()).unwrap_or(u64::MAX);
        let prefix_cache = self.options.telemetry.prefix_cache.meter();
        let mut device = Device {
            worker: self,
            runner,
            slots: Slots::new(slots, slow_reader_ns),
            emissions: Vec::new(),
            prefix_cache,
            has_stopped: false,
        };
        match device.run() {
            Ok(()) => {
                device.has_stopped = true;
                GenerationEnd::Stopped
            }
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

/// The device of one generation, and its sequences. If it is dropped with sequences left, their token channels close
/// without an end. The streams then treat the sequences as lost.
struct Device<'a> {
    worker: &'a mut Worker,
    runner: Box<dyn Runner>,
    slots: Slots,
    emissions: Vec<Emission>,
    prefix_cache: PrefixCacheMeter,
    /// True if the generation ended without a crash.
    has_stopped: bool,
}

impl Device<'_> {
    fn run(&mut self) -> Result<(), StepError> {
        loop {
            let now_ns = monotonic_ns();
            let attention = self.worker.flags.attention.swap(false, Ordering::SeqCst);
            if attention || self.slots.sweep_is_due(now_ns) {
                for freed in self.slots.end_overdue(now_ns) {
                    self.release(&freed);
                }
                self.admit_submitted();
                self.flush();
                if self.worker.flags.stopping.load(Ordering::SeqCst) {
                    self.fail_all();
                }
                if self.is_done() {
                    return Ok(());
                }
            }
            match self.runner.next_step(&self.slots) {
                NextStep::Now => self.step(now_ns)?,
                NextStep::At(due_ns) if due_ns <= now_ns => self.step(now_ns)?,
                NextStep::At(due_ns) => self.wait_until(due_ns.min(self.slots.next_sweep_ns())),
                NextStep::Idle => self.wait_until(self.slots.next_sweep_ns()),
            }
        }
    }

    fn is_done(&self) -> bool {
        let flags = &self.worker.flags;
        flags.stopping.load(Ordering::SeqCst)
            || (flags.draining.load(Ordering::SeqCst) && self.slots.is_empty())
    }

    /// Fails all sequences because the server is shutting down.
    fn fail_all(&mut self) {
        for freed in self.slots.fail_all(&Failure::Draining) {
            self.release(&freed);
        }
    }

    /// Sleeps until shortly before `until_ns`, and spins for the rest of the time. Returns early when the worker is
    /// woken.
    fn wait_until(&self, until_ns: u64) {
        loop {
            if self.worker.flags.attention.load(Ordering::SeqCst) {
                return;
            }
            let left = until_ns.saturating_sub(monotonic_ns());
            if left == 0 {
                return;
            }
            if left > SPIN_NS {
                std::thread::park_timeout(Duration::from_nanos(left - SPIN_NS));
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn admit_submitted(&mut self) {
        while let Ok(submission) = self.worker.commands.try_recv() {
            // The scheduler counts submissions to an earlier generation as lost.
            if submission.generation == self.worker.generation {
                self.admit(submission.assignment);
            }
        }
    }

    fn admit(&mut self, assignment: Assignment) {
        let max_tokens = assignment.sequence.max_tokens;
        let Some(runnable) = assignment.into_runnable() else {
            return self.report_released(max_tokens);
        };
        // The runner's log lines in this call carry the id of this request.
        let assignment = &runnable.assignment;
        let id = assignment.sequence.request_id.0.clone();
        let _span = request_span(&id).entered();
        let sequence = assignment.sequence.clone();
        let Some(slot) = self.choose_slot(&sequence) else {
            tracing::error!("the scheduler assigned a sequence to a worker without a free slot");
            return self.report_released(max_tokens);
        };
        // The sequence occupies its slot before the runner admits it. If the runner panics in `admit`, the sequence is
        // therefore a crash suspect.
        self.slots.occupy(slot, runnable);
        let telemetry = &self.worker.options.telemetry;
        telemetry.sequences_running.increment(1.0);
        match self.runner.admit(slot, sequence) {
            Ok(SequenceStart { cached_tokens }) => {
                tracing::debug!(slot = slot.0, cached_tokens, "a sequence starts");
                telemetry.prefix_cache.count_start(cached_tokens);
                if self.slots.accept(slot, cached_tokens) != Some(SendOutcome::Delivered) {
                    self.worker.flags.attention.store(true, Ordering::SeqCst);
                }
            }
            Err(error) => {
                // A token channel carries a failure only after the acceptance.
                let _ = self.slots.accept(slot, 0);
                self.slots.fail(slot, Failure::Model(error));
                telemetry.sequences_running.decrement(1.0);
                self.report_cleared_suspects();
                self.report_released(max_tokens);
            }
        }
        self.record_prefix_cache();
    }

    /// Lets the runner choose among the free slots. If no slot is free, first frees the slots of sequences that were
    /// cancelled since the last sweep.
    fn choose_slot(&mut self, sequence: &Sequence) -> Option<Slot> {
        if self.slots.free().is_empty() {
            for freed in self.slots.end_overdue(monotonic_ns()) {
                self.release(&freed);
            }
        }
        let free = self.slots.free();
        (!free.is_empty()).then(|| self.runner.choose_slot(sequence, free))
    }

    /// Copies the state of the runner's prefix cache to the metrics.
    fn record_prefix_cache(&mut self) {
        let stats = self.runner.prefix_cache();
        self.prefix_cache.record(stats);
        self.worker.flags.set_prefix_cache(stats);
    }

    fn step(&mut self, started_ns: u64) -> Result<(), StepError> {
        let step_started_ns = &self.worker.flags.step_started_ns;
        step_started_ns.store(started_ns, Ordering::Relaxed);
        self.runner
            .step(&mut Step::new(&self.slots, &mut self.emissions))?;
        step_started_ns.store(0, Ordering::Relaxed);
        let mut emissions = std::mem::take(&mut self.emissions);
        let mut tokens = 0;
        // Emission time of every token for which the runner has set no time.
        let now_ns = monotonic_ns();
        for emission in emissions.drain(..) {
            let freed = match emission {
                Emission::Prompt(slot, token) => self.slots.send_prompt_token(slot, token),
                Emission::Token(slot, token) => {
                    tokens += 1;
                    self.slots.send_token(slot, with_timestamp(token, now_ns))
                }
                Emission::EndOfSequence(slot, token) => {
                    tokens += 1;
                    let token = with_timestamp(token, now_ns);
                    self.slots.finish(slot, Some(token), FinishReason::Stop)
                }
                Emission::Failed(slot, error) => self.slots.fail(slot, Failure::Model(error)),
            };
            if let Some(freed) = freed {
                self.release(&freed);
            }
        }
        self.emissions = emissions;
        self.worker
            .options
            .telemetry
            .tokens_generated
            .increment(tokens);
        self.flush();
        self.report_cleared_suspects();
        Ok(())
    }

    /// Sends the collected tokens to the engine, if the engine is in another process.
    fn flush(&self) {
        if let Some(after_step) = &self.worker.options.after_step {
            after_step();
        }
    }

    fn report_cleared_suspects(&mut self) {
        for _ in 0..self.slots.take_cleared_suspects() {
            self.report(WorkerEvent::SuspectCleared {
                worker: self.worker.options.id,
                generation: self.worker.generation,
            });
        }
    }

    fn release(&mut self, freed: &FreedSlot) {
        // The runner's log lines in this call carry the id of the slot's last request.
        request_span(&freed.request_id.0).in_scope(|| self.runner.release(freed.slot));
        self.record_prefix_cache();
        let telemetry = &self.worker.options.telemetry;
        telemetry.sequences_running.decrement(1.0);
        self.report_cleared_suspects();
        self.report_released(freed.max_tokens);
    }

    fn report_released(&self, max_tokens: u32) {
        self.report(WorkerEvent::Released {
            worker: self.worker.options.id,
            generation: self.worker.generation,
            max_tokens,
        });
    }

    fn report(&self, event: WorkerEvent) {
        if !self.worker.report(event) {
            // The scheduler has ended, so this worker will get no more sequences.
            self.worker.flags.stopping.store(true, Ordering::SeqCst);
            self.worker.flags.attention.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let left = self.slots.count();
        self.worker
            .options
            .telemetry
            .sequences_running
            .decrement(left);
        if !self.has_stopped {
            self.slots.crash_all();
        }
        self.worker
            .flags
            .step_started_ns
            .store(0, Ordering::Relaxed);
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

/// Creates the tracing span for a call of the runner about one sequence.
fn request_span(id: &str) -> tracing::Span {
    tracing::error_span!(target: REQUEST_SPAN_TARGET, "request", id)
}

fn with_timestamp(mut token: Token, now_ns: u64) -> Token {
    if token.emitted_ns == 0 {
        token.emitted_ns = now_ns;
    }
    token
}

fn runner_panic(panic: &(dyn std::any::Any + Send)) -> String {
    format!("the runner panicked: {}", panic_message(panic))
}
