//! A worker on a thread of this process: it loads the model, steps it, and loads it again after a
//! crash.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::device_thread::DeviceThread;
use super::slots::{Freed, Slots};
use super::token_channel::{Failure, SendOutcome};
use super::{Assignment, Flags, Generation, ServedModel, WorkerEvent, WorkerHandle, WorkerId};
use crate::critical::panic_message;
use crate::request::FinishReason;
use crate::runner::{
    Emission, LoadedModel, Loader, Next, Runner, Slot, Step, StepError, Token, monotonic_ns,
};
use crate::telemetry::Telemetry;

#[cfg(test)]
mod tests;

/// How long before a deadline the thread stops sleeping and spins. The kernel wakes a thread some
/// tens of microseconds late; a spin is on time.
const SPIN_NS: u64 = 50_000;

/// How long a crashed worker waits before it loads its model again; doubled each time up to the last.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(10);

/// A life longer than this was a good one: the next crash backs off from the beginning.
const GOOD_LIFE: Duration = Duration::from_secs(30);

/// What a worker needs to begin.
pub struct SpawnOptions {
    /// Its name.
    pub id: WorkerId,
    /// Loads its model.
    pub loader: Arc<dyn Loader>,
    /// How many sequences it runs at once.
    pub slots: usize,
    /// How long a reader may make no progress.
    pub slow_reader_timeout: Duration,
    /// Where its events go.
    pub events: mpsc::Sender<WorkerEvent>,
    /// What it counts into.
    pub telemetry: Telemetry,
    /// Called after each step, where what it made is gathered for an engine elsewhere.
    pub after_step: Option<Box<dyn Fn() + Send>>,
}

/// Starts a worker's thread. It ends when it is drained or stopped, or nobody takes its events.
///
/// # Errors
/// When the system has no thread left.
pub fn spawn(spawn: SpawnOptions) -> std::io::Result<(WorkerHandle, DeviceThread)> {
    // The scheduler never has more sequences under way than there are slots.
    let (commands, receiver) = mpsc::channel(spawn.slots + 1);
    let flags = Arc::new(Flags::default());
    let worker = Worker {
        spawn,
        commands: receiver,
        flags: Arc::clone(&flags),
        life: Generation(0),
    };
    let name = format!("worker-{}", worker.spawn.id.0);
    let thread = DeviceThread::spawn(name, flags, move || worker.run())?;
    let wake = thread.wake().clone();
    Ok((WorkerHandle { commands, wake }, thread))
}

struct Worker {
    spawn: SpawnOptions,
    commands: mpsc::Receiver<(Generation, Assignment)>,
    flags: Arc<Flags>,
    life: Generation,
}

/// How a life of the worker ended.
enum End {
    /// It was told to, or nobody listens to it any more.
    Stopped,
    /// The model could not be loaded.
    LoadFailed(String),
    /// The device failed.
    Crashed(String),
}

impl Worker {
    fn run(mut self) {
        // Without this the kernel may wake the thread 50 µs late to save power.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut back_off = BACK_OFF;
        loop {
            self.life.0 += 1;
            let began = Instant::now();
            let end = catch_unwind(AssertUnwindSafe(|| self.live()))
                .unwrap_or_else(|panic| End::Crashed(message_of(&*panic)));
            if began.elapsed() > GOOD_LIFE {
                back_off = BACK_OFF;
            }
            let event = match end {
                End::Stopped => return,
                End::LoadFailed(reason) => WorkerEvent::LoadFailed(self.spawn.id, reason),
                End::Crashed(reason) => {
                    self.spawn.telemetry.workers_lost.increment(1);
                    WorkerEvent::Lost(self.spawn.id, reason)
                }
            };
            if !self.tell(event) || !wait_out(back_off, || self.is_ending()) {
                return;
            }
            back_off = next_back_off(back_off);
        }
    }

    /// One life: load, then step until the end.
    fn live(&mut self) -> End {
        let id = self.spawn.id;
        let progress = |fraction: f32| {
            // Progress is for the eye: where nobody keeps up, the next one says more.
            let _ = self
                .spawn
                .events
                .try_send(WorkerEvent::Loading(id, fraction));
        };
        let load = || self.spawn.loader.load(self.spawn.slots, &progress);
        // Nothing of a load that panics is used.
        let LoadedModel { model, runner } = match catch_unwind(AssertUnwindSafe(load)) {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => return End::LoadFailed(error.0),
            Err(panic) => return End::LoadFailed(message_of(&*panic)),
        };
        let slots = self.spawn.slots;
        if !self.tell(WorkerEvent::Ready(
            id,
            self.life,
            ServedModel { model, slots },
        )) {
            return End::Stopped;
        }
        let slow_reader_ns =
            u64::try_from(self.spawn.slow_reader_timeout.as_nanos()).unwrap_or(u64::MAX);
        let mut device = Device {
            worker: self,
            runner,
            slots: Slots::new(slots, slow_reader_ns),
            emissions: Vec::new(),
            has_ended: false,
        };
        match device.run() {
            Ok(()) => {
                device.has_ended = true;
                End::Stopped
            }
            Err(error) => End::Crashed(error.0),
        }
    }

    fn tell(&self, event: WorkerEvent) -> bool {
        // The scheduler takes events without ever waiting for a worker, so this wait is short.
        self.spawn.events.blocking_send(event).is_ok()
    }

    fn is_ending(&self) -> bool {
        self.flags.stopping.load(Ordering::SeqCst) || self.flags.draining.load(Ordering::SeqCst)
    }
}

/// One life's device and the sequences on it. When it is dropped with sequences left, their lanes
/// close without an end, which is how their streams learn that they were lost.
struct Device<'a> {
    worker: &'a mut Worker,
    runner: Box<dyn Runner>,
    slots: Slots,
    emissions: Vec<Emission>,
    /// Whether its end was an orderly one.
    has_ended: bool,
}

impl Device<'_> {
    fn run(&mut self) -> Result<(), StepError> {
        loop {
            let now_ns = monotonic_ns();
            let attention = self.worker.flags.attention.swap(false, Ordering::SeqCst);
            if attention || self.slots.look_due(now_ns) {
                for freed in self.slots.look(now_ns) {
                    self.release(&freed);
                }
                self.admit_new();
                self.flush();
                if self.worker.flags.stopping.load(Ordering::SeqCst) {
                    self.give_up();
                }
                if self.is_done() {
                    return Ok(());
                }
            }
            match self.runner.next(&self.slots) {
                Next::Now => self.step(now_ns)?,
                Next::At(due_ns) if due_ns <= now_ns => self.step(now_ns)?,
                Next::At(due_ns) => self.wait_until(due_ns.min(self.slots.next_look_ns())),
                Next::Idle => self.wait_until(self.slots.next_look_ns()),
            }
        }
    }

    fn is_done(&self) -> bool {
        let flags = &self.worker.flags;
        flags.stopping.load(Ordering::SeqCst)
            || (flags.draining.load(Ordering::SeqCst) && self.slots.is_empty())
    }

    /// Tells everyone who still waits that the server does not.
    fn give_up(&mut self) {
        for freed in self.slots.fail_all(&Failure::Draining) {
            self.release(&freed);
        }
    }

    /// Sleeps until shortly before `until_ns` and spins the rest; attention ends either.
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

    fn admit_new(&mut self) {
        while let Ok((life, assignment)) = self.worker.commands.try_recv() {
            // What was sent to an earlier life was counted against slots that are gone: it is lost.
            if life == self.worker.life {
                self.admit(assignment);
            }
        }
    }

    fn admit(&mut self, assignment: Assignment) {
        let max_tokens = assignment.sequence.max_tokens;
        let Some((assignment, deadline_ns)) = assignment.if_still_wanted() else {
            return self.tell_released(max_tokens);
        };
        let Some(slot) = self.next_free() else {
            tracing::error!("the scheduler assigned a sequence to a worker without a free slot");
            return self.tell_released(max_tokens);
        };
        if assignment.token_channel.accept() != SendOutcome::Delivered {
            return self.tell_released(max_tokens);
        }
        match self.runner.admit(slot, assignment.sequence.clone()) {
            Ok(()) => {
                self.slots.occupy(slot, assignment, deadline_ns);
                self.worker.spawn.telemetry.sequences_running.increment(1.0);
            }
            Err(error) => {
                assignment.token_channel.fail(Failure::Model(error));
                self.tell_released(max_tokens);
            }
        }
    }

    /// A free slot. One whose sequence was cancelled since the last look is free, too.
    fn next_free(&mut self) -> Option<Slot> {
        if let Some(slot) = self.slots.next_free() {
            return Some(slot);
        }
        for freed in self.slots.look(monotonic_ns()) {
            self.release(&freed);
        }
        self.slots.next_free()
    }

    fn step(&mut self, began_ns: u64) -> Result<(), StepError> {
        let began = &self.worker.flags.step_started_ns;
        began.store(began_ns, Ordering::Relaxed);
        self.runner
            .step(&mut Step::new(&self.slots, &mut self.emissions))?;
        began.store(0, Ordering::Relaxed);
        let mut emissions = std::mem::take(&mut self.emissions);
        let mut tokens = 0;
        // Once for all of a step: a token's way is timed from here where its runner does not say.
        let now_ns = monotonic_ns();
        for emission in emissions.drain(..) {
            let freed = match emission {
                Emission::Prompt(slot, token) => self.slots.prompt(slot, token),
                Emission::Token(slot, token) => {
                    tokens += 1;
                    self.slots.token(slot, stamped(token, now_ns))
                }
                Emission::EndOfSequence(slot, token) => {
                    tokens += 1;
                    let token = stamped(token, now_ns);
                    self.slots.finish(slot, Some(token), FinishReason::Stop)
                }
                Emission::Failed(slot, error) => self.slots.fail(slot, Failure::Model(error)),
            };
            if let Some(freed) = freed {
                self.release(&freed);
            }
        }
        self.emissions = emissions;
        self.worker.spawn.telemetry.tokens.increment(tokens);
        self.flush();
        self.tell_cleared();
        Ok(())
    }

    /// Lets an engine elsewhere have what has been gathered for it.
    fn flush(&self) {
        if let Some(after_step) = &self.worker.spawn.after_step {
            after_step();
        }
    }

    fn tell_cleared(&mut self) {
        for _ in 0..self.slots.take_cleared() {
            self.tell(WorkerEvent::SuspectCleared(
                self.worker.spawn.id,
                self.worker.life,
            ));
        }
    }

    fn release(&mut self, freed: &Freed) {
        self.runner.release(freed.slot);
        self.worker.spawn.telemetry.sequences_running.decrement(1.0);
        self.tell_cleared();
        self.tell_released(freed.max_tokens);
    }

    fn tell_released(&self, max_tokens: u32) {
        self.tell(WorkerEvent::Released(
            self.worker.spawn.id,
            self.worker.life,
            max_tokens,
        ));
    }

    fn tell(&self, event: WorkerEvent) {
        if !self.worker.tell(event) {
            // Nobody gives this worker work any more.
            self.worker.flags.stopping.store(true, Ordering::SeqCst);
            self.worker.flags.attention.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let left = self.slots.count();
        self.worker
            .spawn
            .telemetry
            .sequences_running
            .decrement(left);
        if !self.has_ended {
            self.slots.crash_all();
        }
        self.worker
            .flags
            .step_started_ns
            .store(0, Ordering::Relaxed);
    }
}

/// Waits out a back-off. False when the worker is to end instead, of which an unpark tells.
fn wait_out(back_off: Duration, is_ending: impl Fn() -> bool) -> bool {
    let until = Instant::now() + back_off;
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

fn stamped(mut token: Token, now_ns: u64) -> Token {
    if token.emitted_ns == 0 {
        token.emitted_ns = now_ns;
    }
    token
}

fn next_back_off(back_off: Duration) -> Duration {
    (back_off * 2).min(BACK_OFF_LIMIT)
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    format!("the runner panicked: {}", panic_message(panic))
}
