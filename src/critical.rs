//! Critical tasks, without which the server cannot work: the scheduler, the listeners, the health checks, and the
//! supervisors of worker processes.
//!
//! tokio confines a panic to its task. If a critical task panicked unnoticed, the server would keep running without
//! serving requests. The first panic is therefore reported to `server`, which drains and exits with an error.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// Error: a critical task has panicked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a bug stopped the server: task '{task}' panicked: {message}")]
pub struct TaskPanicked {
    /// The task's name.
    pub task: &'static str,
    /// The panic's message.
    pub message: String,
}

/// Spawns critical tasks, and reports the first panic among them. Clones share their state.
#[derive(Clone, Debug)]
pub struct CriticalTasks {
    tracker: TaskTracker,
    first_panic: watch::Sender<Option<TaskPanicked>>,
}

impl Default for CriticalTasks {
    fn default() -> Self {
        Self {
            tracker: TaskTracker::new(),
            first_panic: watch::Sender::new(None),
        }
    }
}

impl CriticalTasks {
    /// Returns a spawner whose tasks are tracked by `tracker`. Panics are still reported through `self`.
    #[must_use]
    pub(crate) fn with_tracker(&self, tracker: TaskTracker) -> Self {
        Self {
            tracker,
            first_panic: self.first_panic.clone(),
        }
    }

    /// Returns the tracker of the tasks. It may track other tasks too.
    #[must_use]
    pub(crate) fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Spawns `run` as a critical task. `task` names it in the report of a panic.
    pub fn spawn(&self, task: &'static str, run: impl Future<Output = ()> + Send + 'static) {
        let critical = self.clone();
        self.tracker.spawn(async move {
            // `AssertUnwindSafe` is sound here: the state of a task that panicked is not used again.
            let result = AssertUnwindSafe(run).catch_unwind().await;
            if let Err(panic) = result {
                critical.report(TaskPanicked {
                    task,
                    message: panic_message(&*panic).to_owned(),
                });
            }
        });
    }

    /// Waits until a critical task has panicked.
    pub async fn panicked(&self) -> TaskPanicked {
        let mut panicked = self.first_panic.subscribe();
        let first = panicked.wait_for(Option::is_some).await;
        let first = first
            .expect("`self` holds the sender of the first panic")
            .clone();
        first.expect("`wait_for` waits until a panic has been stored")
    }

    /// Returns the first panic, if there was one.
    #[must_use]
    pub(crate) fn first_panic(&self) -> Option<TaskPanicked> {
        self.first_panic.borrow().clone()
    }

    fn report(&self, panicked: TaskPanicked) {
        tracing::error!(
            task = panicked.task,
            panic = panicked.message,
            "a critical task panicked"
        );
        self.first_panic.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(panicked);
            is_first
        });
    }
}

/// Returns the message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_panic_of_a_critical_task_is_reported_with_its_message() {
        let critical = CriticalTasks::default();
        critical.spawn("normal", async {});
        critical.tracker().close();
        critical.tracker().wait().await;
        assert_eq!(critical.first_panic(), None, "a normal end is not a panic");
        critical.spawn("first", async { panic!("number {}", 1) });
        let first = critical.panicked().await;
        assert_eq!((first.task, &*first.message), ("first", "number 1"));
        critical.spawn("second", async { panic!("number 2") });
        critical.tracker().wait().await;
        assert_eq!(
            critical.panicked().await,
            first,
            "a later panic does not replace the first panic"
        );
    }
}
