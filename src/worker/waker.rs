//! Wakes a worker and tells it to stop, without sending a message.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Thread;

use tokio::sync::Notify;

use super::flags::Flags;

/// Makes a worker check its token channels, because a reader was dropped or a full channel has room again.
///
/// Waking sets a flag and unparks the thread. No message is sent, so a wake-up cannot be lost, block or overflow a
/// queue.
#[derive(Clone, Debug)]
pub(crate) struct WorkerWaker {
    pub(super) flags: Arc<Flags>,
    pub(super) target: WakeTarget,
}

/// The thread or task that runs the worker.
#[derive(Clone, Debug)]
pub(super) enum WakeTarget {
    Thread(Thread),
    Task(Arc<Notify>),
}

impl WorkerWaker {
    /// Wakes the worker. A worker that is already awake checks its token channels once more before it sleeps.
    pub(crate) fn wake(&self) {
        self.flags.attention.store(true, Ordering::SeqCst);
        match &self.target {
            WakeTarget::Thread(thread) => thread.unpark(),
            WakeTarget::Task(notify) => notify.notify_one(),
        }
    }

    /// Tells the worker to stop now.
    pub(super) fn stop(&self) {
        self.flags.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }
}
