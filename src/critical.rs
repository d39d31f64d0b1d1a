//! Tasks that the server cannot work without: the scheduler, the listeners, the health follower, the supervisors of
//! worker processes.
//!
//! tokio contains a panic within its task. For these tasks that would leave a server that runs but does not serve. So
//! the first panic among them is reported to whoever runs the server, which then drains it and ends with an error.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// A critical task has panicked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a bug has ended the server: the task '{task}' panicked: {message}")]
pub struct TaskPanicked {
    /// The task's name.
    pub task: &'static str,
    /// The panic's message.
    pub message: String,
}

/// Watches critical tasks. Clones share what they know.
#[derive(Clone, Debug)]
pub struct CriticalTasks(watch::Sender<Option<TaskPanicked>>);

impl Default for CriticalTasks {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl CriticalTasks {
    /// Runs a task on this tracker, and reports its panic.
    pub fn spawn(
        &self,
        tasks: &TaskTracker,
        task: &'static str,
        run: impl Future<Output = ()> + Send + 'static,
    ) {
        let critical = self.clone();
        tasks.spawn(async move {
            // Nothing of the task is looked at after its panic.
            let ended = AssertUnwindSafe(run).catch_unwind().await;
            if let Err(panic) = ended {
                critical.report(TaskPanicked {
                    task,
                    message: panic_message(&*panic).to_owned(),
                });
            }
        });
    }

    /// Waits until a task has panicked.
    pub async fn panicked(&self) -> TaskPanicked {
        let mut panicked = self.0.subscribe();
        let first = panicked.wait_for(Option::is_some).await;
        let first = first.expect("this is one of the senders").clone();
        first.expect("it was waited for")
    }

    /// The first task that has panicked, if any has.
    #[must_use]
    pub fn first_panic(&self) -> Option<TaskPanicked> {
        self.0.borrow().clone()
    }

    fn report(&self, panicked: TaskPanicked) {
        tracing::error!(
            task = panicked.task,
            panic = panicked.message,
            "a task that the server needs has panicked"
        );
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(panicked);
            is_first
        });
    }
}

/// The message that a panic was raised with.
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
        let (critical, tasks) = (CriticalTasks::default(), TaskTracker::new());
        critical.spawn(&tasks, "orderly", async {});
        tasks.close();
        tasks.wait().await;
        assert_eq!(critical.first_panic(), None, "an orderly end is no panic");
        critical.spawn(&tasks, "first", async { panic!("number {}", 1) });
        let first = critical.panicked().await;
        assert_eq!((first.task, &*first.message), ("first", "number 1"));
        critical.spawn(&tasks, "second", async { panic!("number 2") });
        tasks.wait().await;
        assert_eq!(critical.panicked().await, first, "the first is the cause");
    }
}
