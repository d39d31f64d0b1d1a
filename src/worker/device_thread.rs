//! The thread of a worker's device, which is joined when its owner drops it.
//!
//! It must not know what runs on the thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;

use super::{Flags, Wake, WakeTarget};

/// The longest time that dropping a [`DeviceThread`] waits for the device's last call to return.
const LAST_CALL: Duration = Duration::from_secs(5);

/// A worker's thread. When this is dropped the worker is stopped and its thread joined, so that no device computes
/// behind the back of its owner, or of a process that exits.
#[derive(Debug)]
pub struct DeviceThread {
    wake: Wake,
    ended: Arc<Ended>,
    /// `None` once it is joined or abandoned.
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts a thread of this name that runs until it is stopped by these flags.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(super) fn spawn(
        name: String,
        flags: Arc<Flags>,
        run: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let ended = Arc::new(Ended::default());
        let ends = SignalEndOnDrop(Arc::clone(&ended));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _ends = ends;
            run();
        })?;
        let sleeper = WakeTarget::Thread(thread.thread().clone());
        Ok(Self {
            wake: Wake { flags, sleeper },
            ended,
            thread: Some(thread),
        })
    }

    /// Wakes the thread.
    pub(super) fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Tells the worker to end now, and to drop what it still runs. The call of its device that is under way goes on.
    pub fn stop(&self) {
        self.wake.stop();
    }

    /// Waits for the thread's end, at most until the deadline. True once it has ended. A call of the device that hangs
    /// cannot be interrupted.
    ///
    /// It blocks the calling thread.
    #[must_use]
    pub fn join_until(&mut self, deadline: Instant) -> bool {
        let at_most = deadline.saturating_duration_since(Instant::now());
        if !self.ended.wait(at_most) {
            return false;
        }
        if let Some(thread) = self.thread.take() {
            // Nothing but its own end is left for the thread. A panic was reported by the hook.
            let _ = thread.join();
        }
        true
    }

    /// Stops the worker and waits for nothing. The device may go on computing, so the process must not exit in a way
    /// that runs destructors: see [`crate::exit`].
    pub fn abandon(mut self) {
        self.stop();
        self.thread = None;
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        if self.thread.is_none() {
            return;
        }
        self.stop();
        if !self.join_until(Instant::now() + LAST_CALL) {
            tracing::warn!("a device call did not return; its thread is abandoned");
        }
    }
}

/// Whether a thread has come to its end.
#[derive(Debug, Default)]
struct Ended {
    has_ended: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn wait(&self, at_most: Duration) -> bool {
        let has_ended = self
            .has_ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(has_ended, at_most, |has_ended| !*has_ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Says that a thread has ended, also where it panics.
struct SignalEndOnDrop(Arc<Ended>);

impl Drop for SignalEndOnDrop {
    fn drop(&mut self) {
        let has_ended = &self.0.has_ended;
        *has_ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}
