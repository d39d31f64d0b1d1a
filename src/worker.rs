//! A device worker, as the rest of the engine sees it: a handle that takes sequences, and events that
//! come back. It must not know requests or queues, nor how tokens become text.
//!
//! The handle says nothing about where the worker runs: on a thread of this process ([`thread`]), or in
//! another that has dialled in ([`attached`]). [`attach`] is the other end of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

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

/// Names a worker within its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub usize);

/// Counts the times that a worker loaded its model, so that work meant for an earlier life is not
/// taken for work of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(pub u64);

/// A sequence on its way to a slot, with the token_channel that its tokens will take.
pub struct Assignment {
    /// What to generate.
    pub sequence: Sequence,
    /// Where the tokens go.
    pub token_channel: TokenSender,
    /// When nobody waits for them any more.
    pub deadline: Instant,
    /// Whether it was on a worker when that crashed, and has made no token since: it may be why.
    pub is_suspect: bool,
}

#[cfg(test)]
impl Assignment {
    /// A sequence of so many tokens whose reader has room for one, and that reader.
    fn for_test(max_tokens: u32, deadline: Instant) -> (Self, token_channel::TokenReceiver) {
        let queue = Arc::new(Notify::new());
        let (sender, receiver) = token_channel::token_channel(1, queue, metrics::Counter::noop());
        let sequence = Sequence {
            prompt: [0].into(),
            delivered: Vec::new(),
            choice: 0,
            seed: 0,
            max_tokens,
            sampling: crate::request::Sampling::default(),
            logit_bias: [].into(),
            stop_tokens: crate::request::StopTokens::default(),
            logprobs: None,
            scores_prompt: false,
            timestamps: false,
            caller: crate::request::Caller::default(),
        };
        let assignment = Self {
            sequence,
            token_channel: sender,
            deadline,
            is_suspect: false,
        };
        (assignment, receiver)
    }
}

/// What a worker tells the scheduler. Tokens do not come this way.
pub enum WorkerEvent {
    /// A worker has dialled in, for the model of this place in the catalog; its handle is this from now on.
    Joined(WorkerId, usize, WorkerHandle),
    /// How far the model is loaded, from 0 to 1.
    Loading(WorkerId, f32),
    /// The model is loaded and all slots are free.
    Ready(WorkerId, Generation, ServedModel),
    /// A slot is free again; the sequence had asked for so many tokens.
    Released(WorkerId, Generation, u32),
    /// Whether a call of a worker's device takes too long, here where it cannot be ended.
    Stuck(WorkerId, bool),
    /// A sequence that was on a worker when that crashed has made a token on this one.
    SuspectCleared(WorkerId, Generation),
    /// The worker crashed: everything it held is gone. It loads its model again.
    Lost(WorkerId, String),
    /// The model could not be loaded at all.
    LoadFailed(WorkerId, String),
    /// It could not be started so often that it is not started any more.
    GivenUp(WorkerId, String),
    /// The worker has gone, and nobody here starts it again: everything it held is gone, too.
    Left(WorkerId, String),
}

/// What a worker serves once it is ready.
pub struct ServedModel {
    /// The model.
    pub model: Arc<dyn Model>,
    /// How many sequences it runs at once.
    pub slots: usize,
}

/// Gives a worker sequences to run, and its attention to those it has.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: mpsc::Sender<(Generation, Assignment)>,
    wake: Wake,
}

impl WorkerHandle {
    /// Hands a sequence to the worker, which then answers on its token_channel: accepted, or refused.
    ///
    /// # Errors
    /// Gives the assignment back when the worker is gone, or has more than it has slots for.
    pub fn submit(&self, life: Generation, assignment: Assignment) -> Result<(), Box<Assignment>> {
        assignment.token_channel.placed(self.wake.clone());
        self.commands
            .try_send((life, assignment))
            .map_err(|error| match error {
                TrySendError::Full((_, assignment)) | TrySendError::Closed((_, assignment)) => {
                    Box::new(assignment)
                }
            })?;
        self.wake.attend();
        Ok(())
    }

    /// The same for a worker whose sequences are cancelled elsewhere: those that were keep their places until it
    /// looks, which may be a whole call of its device away. One whose thread has ended drops what it is handed.
    async fn submit_when_room(&self, life: Generation, assignment: Assignment) {
        let _ = self.commands.send((life, assignment)).await;
        self.wake.attend();
    }

    /// Makes the worker look at its lanes.
    fn attend(&self) {
        self.wake.attend();
    }

    /// How long the call of the device that is under way has lasted.
    pub(crate) fn step_duration(&self) -> Duration {
        match self.wake.flags.step_started_ns.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            began_ns => Duration::from_nanos(monotonic_ns().saturating_sub(began_ns)),
        }
    }

    /// Tells the worker to end once its sequences have ended.
    pub fn drain(&self) {
        self.wake.flags.draining.store(true, Ordering::SeqCst);
        self.wake.attend();
    }

    /// Tells the worker to end now, and to drop what it still runs.
    pub fn stop(&self) {
        self.wake.stop();
    }
}

/// Makes a worker look at its lanes: one was closed (its client went away) or has room again.
///
/// It is a flag and an unpark, not a message: it cannot be lost, cannot wait and cannot overflow.
#[derive(Clone, Debug)]
pub struct Wake {
    flags: Arc<Flags>,
    sleeper: WakeTarget,
}

/// Who waits for attention.
#[derive(Clone, Debug)]
enum WakeTarget {
    Thread(Thread),
    Task(Arc<Notify>),
}

#[derive(Debug, Default)]
struct Flags {
    attention: AtomicBool,
    draining: AtomicBool,
    stopping: AtomicBool,
    /// When the call of the device that is under way began, by CLOCK_MONOTONIC; 0 where there is none.
    step_started_ns: AtomicU64,
}

impl Wake {
    /// Wakes the worker if it waits, or makes it look before it waits again.
    pub fn attend(&self) {
        self.flags.attention.store(true, Ordering::SeqCst);
        match &self.sleeper {
            WakeTarget::Thread(thread) => thread.unpark(),
            WakeTarget::Task(notify) => notify.notify_one(),
        }
    }

    /// Tells the worker to end now.
    fn stop(&self) {
        self.flags.stopping.store(true, Ordering::SeqCst);
        self.attend();
    }
}
