//! Device workers. The rest of the engine submits sequences to a worker through its [`WorkerHandle`], and receives
//! the worker's [`WorkerEvent`]s.
//!
//! A handle hides where the worker runs: on a thread of this process ([`thread`]), or in another process that has
//! connected to the engine ([`attached`]). [`attach`] is the worker's side of such a connection.
//!
//! This module must not know about requests, queues, or how tokens become text.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;

use crate::models::ModelId;
use crate::prefix_index::PromptBlocks;
use crate::runner::{Model, PrefixCacheStats, Sequence, monotonic_ns};

pub mod attach;
pub mod attached;
pub mod child;
pub mod device_thread;
pub mod engine_address;
mod flags;
mod outbox;
mod sequence_output;
mod slots;
mod socket;
mod tasks;
pub mod thread;
pub mod token_channel;
mod waker;
mod wire;

use flags::Flags;
use token_channel::TokenSender;
use waker::WakeTarget;
pub(crate) use waker::WorkerWaker;

/// Identifies a worker within its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub usize);

/// Counts the runs of a worker. A generation begins when the worker loads its model and ends when the worker is lost.
/// Each load increments the number.
///
/// Submissions and events carry the generation, so that one from before a crash is recognised and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(pub u64);

/// Identifies an assignment within its scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AssignmentId(pub u64);

/// A sequence to run, with the token channel that carries its tokens.
pub struct Assignment {
    /// The assignment's id. The worker reports this id when the slot of the sequence is free again.
    pub id: AssignmentId,
    /// The sequence.
    pub sequence: Sequence,
    /// The sending end of the sequence's token channel.
    pub token_channel: TokenSender,
    /// Time at which the worker fails the sequence.
    pub deadline: Instant,
    /// Hashes of the prompt's blocks. With them the scheduler finds the worker that has computed the longest prefix of
    /// the prompt. Empty if the model's runner reuses no prefixes.
    pub prompt_blocks: Arc<PromptBlocks>,
    /// True if the sequence ran on a worker that crashed, and has produced no token since. The sequence may have
    /// caused the crash.
    pub is_suspect: bool,
}

/// An assignment, and the generation of the worker to which it is submitted.
struct Submission {
    generation: Generation,
    assignment: Assignment,
}

#[cfg(test)]
impl Assignment {
    /// The id of every assignment from [`Self::for_test`].
    pub(crate) const TEST_ID: AssignmentId = AssignmentId(7);

    /// Creates a sequence of up to `max_tokens` tokens for tests, with a token channel that has credit for one token.
    pub(crate) fn for_test(
        max_tokens: u32,
        deadline: Instant,
    ) -> (Self, token_channel::TokenReceiver) {
        let queue = Arc::new(tokio::sync::Notify::new());
        let (sender, receiver) = token_channel::token_channel(1, queue, metrics::Counter::noop());
        let sequence = Sequence::new([0], max_tokens);
        let assignment = Self {
            id: Self::TEST_ID,
            sequence,
            token_channel: sender,
            deadline,
            prompt_blocks: Arc::default(),
            is_suspect: false,
        };
        (assignment, receiver)
    }
}

/// Event that a worker reports to the scheduler. Tokens travel on token channels instead.
pub enum WorkerEvent {
    /// A worker process has connected.
    Joined {
        /// Id of the worker.
        worker: WorkerId,
        /// Model that the worker serves.
        model: ModelId,
        /// Handle to submit sequences to the worker.
        handle: WorkerHandle,
    },
    /// The worker has loaded another part of its model.
    Loading {
        /// Id of the worker.
        worker: WorkerId,
        /// Loaded fraction of the model, from 0 to 1.
        fraction: f32,
    },
    /// The model is loaded and all slots are free.
    Ready {
        /// Id of the worker.
        worker: WorkerId,
        /// Generation of the worker that begins now.
        generation: Generation,
        /// Loaded model and number of slots.
        served: ServedModel,
    },
    /// A sequence has ended and its slot is free again.
    Released {
        /// Id of the worker.
        worker: WorkerId,
        /// Generation of the worker in which the sequence ran.
        generation: Generation,
        /// Id of the sequence's assignment.
        assignment: AssignmentId,
    },
    /// A device call on a thread of this process exceeds the step limit, or has returned after all. The call cannot be
    /// interrupted.
    Stuck {
        /// Id of the worker.
        worker: WorkerId,
        /// True if the call exceeds the step limit. False if the call has returned.
        is_stuck: bool,
    },
    /// A crash suspect has produced a token or has ended.
    SuspectCleared {
        /// Id of the worker.
        worker: WorkerId,
        /// Generation of the worker in which the crash suspect runs.
        generation: Generation,
    },
    /// The worker crashed and lost all its sequences. It loads its model again.
    Lost {
        /// Id of the worker.
        worker: WorkerId,
        /// Reason for the operator.
        reason: String,
    },
    /// The worker failed to load its model, and tries again.
    LoadFailed {
        /// Id of the worker.
        worker: WorkerId,
        /// Reason for the operator.
        reason: String,
    },
    /// The worker failed to start too often, and is not started again.
    GivenUp {
        /// Id of the worker.
        worker: WorkerId,
        /// Reason for the operator.
        reason: String,
    },
    /// A worker that this engine did not start has disconnected. All its sequences are lost.
    Left {
        /// Id of the worker.
        worker: WorkerId,
        /// Reason for the operator.
        reason: String,
    },
}

/// The model of a worker that is ready.
pub struct ServedModel {
    /// The model.
    pub model: Arc<dyn Model>,
    /// Number of sequences that the worker runs at once.
    pub slots: usize,
}

/// Handle to a worker: submits sequences, wakes the worker and stops it.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: mpsc::Sender<Submission>,
    waker: WorkerWaker,
}

impl WorkerHandle {
    /// Submits a sequence. The worker accepts or rejects it through the token channel.
    ///
    /// # Errors
    /// Returns the assignment if the worker has ended or its command queue is full.
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

    /// Submits a sequence, and waits while the command queue is full. If the device thread has ended, the assignment
    /// is dropped.
    ///
    /// Only a worker process needs to wait. Its engine cancels sequences on its own, and may submit the next ones
    /// while the cancelled ones are still in the queue: the device thread notices a cancellation only after its
    /// current device call.
    async fn submit_waiting(&self, submission: Submission) {
        let _ = self.commands.send(submission).await;
        self.waker.wake();
    }

    /// Makes the worker check its token channels.
    fn wake(&self) {
        self.waker.wake();
    }

    /// Returns how long the current device call has been running; zero if none is running.
    pub(crate) fn step_duration(&self) -> Duration {
        match self.waker.flags.step_started_ns.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            started_ns => Duration::from_nanos(monotonic_ns().saturating_sub(started_ns)),
        }
    }

    /// Returns the state of the device's prefix cache.
    fn prefix_cache(&self) -> PrefixCacheStats {
        self.waker.flags.prefix_cache()
    }

    /// Tells the worker to stop after its sequences have ended.
    pub fn drain(&self) {
        self.waker.flags.draining.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Tells the worker to stop now. Its sequences fail with [`token_channel::Failure::Draining`].
    pub fn stop(&self) {
        self.waker.stop();
    }
}
