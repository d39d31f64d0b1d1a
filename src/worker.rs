//! A device worker, as the rest of the engine sees it: a handle that takes sequences, and events that
//! come back. It must not know requests or queues, nor how tokens become text.
//!
//! The handle says nothing about where the worker runs. Today that is a thread of this process
//! ([`thread`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::thread::Thread;

use tokio::time::Instant;

use crate::runner::{Model, Sequence};

pub mod lane;
mod slots;
pub mod thread;

use lane::LaneSender;

/// Names a worker within its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub usize);

/// Counts the times that a worker loaded its model, so that work meant for an earlier life is not
/// taken for work of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life(pub u64);

/// A sequence on its way to a slot, with the lane that its tokens will take.
pub struct Assignment {
    /// What to generate.
    pub sequence: Sequence,
    /// Where the tokens go.
    pub lane: LaneSender,
    /// When nobody waits for them any more.
    pub deadline: Instant,
}

#[cfg(test)]
impl Assignment {
    /// A sequence of so many tokens whose reader has room for one, and that reader.
    fn for_test(max_tokens: u32, deadline: Instant) -> (Self, lane::LaneReceiver) {
        let queue = Arc::new(tokio::sync::Notify::new());
        let (sender, receiver) = lane::lane(1, queue, metrics::Counter::noop());
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
            stamps: false,
            caller: crate::request::Caller::default(),
        };
        let assignment = Self {
            sequence,
            lane: sender,
            deadline,
        };
        (assignment, receiver)
    }
}

/// What a worker tells the scheduler. Tokens do not come this way.
pub enum WorkerEvent {
    /// How far the model is loaded, from 0 to 1.
    Loading(WorkerId, f32),
    /// The model is loaded and all slots are free.
    Ready(WorkerId, Life, Arc<dyn Model>),
    /// A slot is free again; the sequence had asked for so many tokens.
    Released(WorkerId, Life, u32),
    /// The worker crashed: everything it held is gone. It loads its model again.
    Lost(WorkerId, String),
    /// The model could not be loaded at all.
    LoadFailed(WorkerId, String),
}

/// Gives a worker sequences to run, and its attention to those it has.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: SyncSender<(Life, Assignment)>,
    wake: Wake,
}

impl WorkerHandle {
    /// Hands a sequence to the worker, which then answers on its lane: accepted, or refused.
    ///
    /// # Errors
    /// Gives the assignment back when the worker is gone, or has more than it has slots for.
    pub fn submit(&self, life: Life, assignment: Assignment) -> Result<(), Box<Assignment>> {
        assignment.lane.placed(self.wake.clone());
        self.commands
            .try_send((life, assignment))
            .map_err(|error| match error {
                TrySendError::Full((_, assignment))
                | TrySendError::Disconnected((_, assignment)) => Box::new(assignment),
            })?;
        self.wake.attend();
        Ok(())
    }

    /// Tells the worker to end once its sequences have ended.
    pub fn drain(&self) {
        self.wake.flags.draining.store(true, Ordering::SeqCst);
        self.wake.attend();
    }

    /// Tells the worker to end now, and to drop what it still runs.
    pub fn stop(&self) {
        self.wake.flags.stopping.store(true, Ordering::SeqCst);
        self.wake.attend();
    }
}

/// Makes a worker look at its lanes: one was closed (its client went away) or has room again.
///
/// It is a flag and an unpark, not a message: it cannot be lost, cannot wait and cannot overflow.
#[derive(Clone)]
pub struct Wake {
    flags: Arc<Flags>,
    thread: Thread,
}

#[derive(Default)]
struct Flags {
    attention: AtomicBool,
    draining: AtomicBool,
    stopping: AtomicBool,
}

impl Wake {
    /// Wakes the worker if it waits, or makes it look before it waits again.
    pub fn attend(&self) {
        self.flags.attention.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}
