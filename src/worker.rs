//! Device workers. The rest of the engine gives a worker sequences through its [`WorkerHandle`] and receives its
//! [`WorkerEvent`]s.
//!
//! A handle hides where the worker runs: on a thread of this process ([`thread`]), or in another process that has
//! connected to the engine ([`attached`]). [`attach`] is the worker's side of such a connection.
//!
//! This module must not know about requests, queues, or how tokens become text.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::models::ModelId;
use crate::runner::{Model, Sequence, monotonic_ns};

pub mod attach;
pub mod attached;
pub mod child;
pub mod device_thread;
pub mod engine_address;
mod outbox;
mod slots;
mod socket;
mod tasks;
pub mod thread;
pub mod token_channel;
mod wire;

use token_channel::TokenSender;

/// Identifies a worker within its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub usize);

/// The number of one run of a worker, from loading its model to its loss. It grows with every load.
///
/// Submissions and events carry it, so that one from before a crash is recognised and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(pub u64);

/// A sequence to run, with the token channel that carries its output.
pub struct Assignment {
    /// The sequence.
    pub sequence: Sequence,
    /// The sending half of its token channel.
    pub token_channel: TokenSender,
    /// The worker fails the sequence at this time.
    pub deadline: Instant,
    /// The sequence ran on a worker that crashed, and has produced no token since. It may have caused the crash.
    pub is_suspect: bool,
}

/// An assignment for one generation of a worker.
struct Submission {
    generation: Generation,
    assignment: Assignment,
}

#[cfg(test)]
impl Assignment {
    /// A sequence of up to `max_tokens` tokens, and the receiver of its token channel, which has room for one token.
    pub(crate) fn for_test(
        max_tokens: u32,
        deadline: Instant,
    ) -> (Self, token_channel::TokenReceiver) {
        let queue = Arc::new(Notify::new());
        let (sender, receiver) = token_channel::token_channel(1, queue, metrics::Counter::noop());
        let sequence = Sequence::new([0], max_tokens);
        let assignment = Self {
            sequence,
            token_channel: sender,
            deadline,
            is_suspect: false,
        };
        (assignment, receiver)
    }
}

/// A worker's report to the scheduler. Tokens travel on token channels instead. Each `String` is a reason for the
/// operator.
pub enum WorkerEvent {
    /// A worker process has connected. It serves this model, through this handle.
    Joined(WorkerId, ModelId, WorkerHandle),
    /// Loading progress of the model, from 0 to 1.
    Loading(WorkerId, f32),
    /// The model is loaded and all slots are free.
    Ready(WorkerId, Generation, ServedModel),
    /// A slot is free again. Its sequence had this `max_tokens`.
    Released(WorkerId, Generation, u32),
    /// True when a device call on a thread of this process exceeds the step limit; false when it has returned. Such a
    /// call cannot be ended.
    Stuck(WorkerId, bool),
    /// A crash suspect has produced a token or has ended.
    SuspectCleared(WorkerId, Generation),
    /// The worker crashed and lost all its sequences. It loads its model again.
    Lost(WorkerId, String),
    /// The model cannot be loaded. The worker tries again.
    LoadFailed(WorkerId, String),
    /// The worker failed to start too often, and is not started again.
    GivenUp(WorkerId, String),
    /// A worker that this engine did not start has disconnected. All its sequences are lost.
    Left(WorkerId, String),
}

/// The model of a worker that is ready.
pub struct ServedModel {
    /// The model.
    pub model: Arc<dyn Model>,
    /// Number of sequences that the worker runs at once.
    pub slots: usize,
}

/// Submits sequences to a worker, wakes it and ends it.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: mpsc::Sender<Submission>,
    waker: WorkerWaker,
}

impl WorkerHandle {
    /// Submits a sequence. The worker accepts or rejects it through the token channel.
    ///
    /// # Errors
    /// Returns the assignment when the worker is gone or its command queue is full.
    pub fn submit(
        &self,
        generation: Generation,
        assignment: Assignment,
    ) -> Result<(), Box<Assignment>> {
        assignment.token_channel.set_worker(self.waker.clone());
        let submission = Submission {
            generation,
            assignment,
        };
        self.commands
            .try_send(submission)
            .map_err(|error| match error {
                TrySendError::Full(rejected) | TrySendError::Closed(rejected) => {
                    Box::new(rejected.assignment)
                }
            })?;
        self.waker.wake();
        Ok(())
    }

    /// Submits a sequence, and waits while the command queue is full.
    ///
    /// A remote engine cancels sequences on its own, and may submit the next ones before the device thread has noticed:
    /// cancelled sequences stay in the queue until the current device call returns. If the thread has ended, the
    /// assignment is dropped.
    async fn submit_when_room(&self, submission: Submission) {
        let _ = self.commands.send(submission).await;
        self.waker.wake();
    }

    /// Makes the worker check its token channels.
    fn wake(&self) {
        self.waker.wake();
    }

    /// Duration of the current device call so far; zero between calls.
    pub(crate) fn step_duration(&self) -> Duration {
        match self.waker.flags.step_started_ns.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            started_ns => Duration::from_nanos(monotonic_ns().saturating_sub(started_ns)),
        }
    }

    /// Asks the worker to end once its sequences have ended.
    pub fn drain(&self) {
        self.waker.flags.draining.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Asks the worker to end now. Its sequences fail with [`token_channel::Failure::Draining`].
    pub fn stop(&self) {
        self.waker.stop();
    }
}

/// Makes a worker check its token channels, because a reader went away or has room again.
///
/// It sets a flag and unparks, and sends no message: it cannot be lost, cannot block and cannot overflow.
#[derive(Clone, Debug)]
pub struct WorkerWaker {
    flags: Arc<Flags>,
    target: WakeTarget,
}

/// The thread or task that runs the worker.
#[derive(Clone, Debug)]
enum WakeTarget {
    Thread(Thread),
    Task(Arc<Notify>),
}

#[derive(Debug, Default)]
struct Flags {
    /// Set by [`WorkerWaker::wake`], until the worker has checked its token channels.
    attention: AtomicBool,
    draining: AtomicBool,
    stopping: AtomicBool,
    /// Start of the current device call, in nanoseconds of CLOCK_MONOTONIC; 0 between calls.
    step_started_ns: AtomicU64,
}

impl WorkerWaker {
    /// Wakes the worker. If it is awake, it checks its token channels again before it sleeps.
    pub fn wake(&self) {
        self.flags.attention.store(true, Ordering::SeqCst);
        match &self.target {
            WakeTarget::Thread(thread) => thread.unpark(),
            WakeTarget::Task(notify) => notify.notify_one(),
        }
    }

    /// Asks the worker to end now.
    fn stop(&self) {
        self.flags.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }
}
