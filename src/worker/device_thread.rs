//! The thread that a worker's device runs on. Dropping its handle joins the thread.
//!
//! This module must not know what runs on the thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::Instant;

use super::{Flags, WakeTarget, WorkerWaker};

/// Maximum time that dropping a [`DeviceThread`] waits for the current device call.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Handle to a device thread. Dropping it stops the worker and joins the thread. The device therefore never computes
/// after its owner is gone or while the process exits.
#[derive(Debug)]
pub struct DeviceThread {
    waker: WorkerWaker,
    ended: Arc<EndSignal>,
    /// `None` after the thread was joined or abandoned.
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts a thread with this name. `run` must return soon after `flags` tell it to stop.
    ///
    /// # Errors
    /// Returns an error if the system cannot start another thread.
    pub(super) fn spawn(
        name: String,
        flags: Arc<Flags>,
        run: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let ended = Arc::new(EndSignal::default());
        let signal = SignalEndOnDrop(Arc::clone(&ended));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _signal = signal;
            run();
        })?;
        let target = WakeTarget::Thread(thread.thread().clone());
        Ok(Self {
            waker: WorkerWaker { flags, target },
            ended,
            thread: Some(thread),
        })
    }

    pub(super) fn waker(&self) -> &WorkerWaker {
        &self.waker
    }

    /// Tells the worker to stop now and to drop its sequences. The current device call still runs to its end.
    pub fn stop(&self) {
        self.waker.stop();
    }

    /// Blocks until the thread has ended or the deadline has passed. Returns true if the thread has ended. A device
    /// call cannot be interrupted, so a hung call exceeds any deadline.
    #[must_use]
    pub(crate) fn join_until(&mut self, deadline: Instant) -> bool {
        let timeout = deadline.saturating_duration_since(Instant::now());
        if !self.ended.wait(timeout) {
            return false;
        }
        if let Some(thread) = self.thread.take() {
            // The thread is about to return, so this does not block. If it panicked, the panic hook has already
            // reported the panic.
            let _ = thread.join();
        }
        true
    }

    /// Stops the worker without waiting for its thread. The device may still be computing, so the process must then
    /// exit without running destructors, through [`crate::exit`].
    pub(crate) fn abandon(mut self) {
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
        if !self.join_until(Instant::now() + JOIN_TIMEOUT) {
            tracing::warn!("a device call did not return; its thread is abandoned");
        }
    }
}

/// Notifies a waiting thread that the device thread has ended.
#[derive(Debug, Default)]
struct EndSignal {
    has_ended: Mutex<bool>,
    changed: Condvar,
}

impl EndSignal {
    fn wait(&self, timeout: Duration) -> bool {
        let has_ended = self
            .has_ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(has_ended, timeout, |has_ended| !*has_ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Notifies that the thread has ended when it is dropped, even by a panic.
struct SignalEndOnDrop(Arc<EndSignal>);

impl Drop for SignalEndOnDrop {
    fn drop(&mut self) {
        let has_ended = &self.0.has_ended;
        *has_ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}
