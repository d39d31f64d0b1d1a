//! The tasks of a worker's connection to its engine. The runtime polls them. After each step, the device thread polls
//! them too, to send the step's tokens itself: waking another thread would take longer than sending the tokens.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker};

use futures_util::stream::FuturesUnordered;
use tokio::runtime::Handle;
use tokio_stream::Stream;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A set of tasks that run until [`Tasks::abort_all`]. Clones share the same set.
///
/// The tasks may hold clones of the set. Dropping all other clones therefore does not end the tasks.
#[derive(Clone)]
pub(super) struct Tasks(Arc<TaskSet>);

struct TaskSet {
    runtime: Handle,
    running: Mutex<FuturesUnordered<Task>>,
    /// Tasks that were spawned since the last poll.
    spawned: Mutex<Vec<Task>>,
    /// Wakes the runtime's task that polls this set. Does nothing until that task runs.
    waker: Mutex<Waker>,
}

impl Tasks {
    /// Creates an empty set. Its tasks use the I/O driver of the current runtime.
    pub(super) fn new() -> Self {
        Self(Arc::new(TaskSet {
            runtime: Handle::current(),
            running: Mutex::default(),
            spawned: Mutex::default(),
            waker: Mutex::new(Waker::noop().clone()),
        }))
    }

    /// Polls the tasks for as long as this future is polled.
    pub(super) async fn run(&self) -> Infallible {
        std::future::poll_fn(|cx| {
            lock(&self.0.waker).clone_from(cx.waker());
            self.0.poll(&mut lock(&self.0.running), cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Drops all tasks of the set.
    pub(super) fn abort_all(&self) {
        let spawned = std::mem::take(&mut *lock(&self.0.spawned));
        let running = std::mem::take(&mut *lock(&self.0.running));
        // A task that is being dropped may spawn another task.
        drop((spawned, running));
        lock(&self.0.spawned).clear();
    }

    /// Calls `wake`, which should wake a task of this set, and then polls the woken task on this thread. If the
    /// runtime is polling the set at the moment, the runtime polls the task instead.
    pub(super) fn wake_and_poll(&self, wake: impl FnOnce()) {
        let mut running = match self.0.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return wake(),
        };
        // The sockets of the tasks belong to the runtime's I/O driver.
        let _runtime = self.0.runtime.enter();
        // This thread polls the tasks, so there is no need to wake the runtime.
        self.0.poll(&mut running, Waker::noop());
        wake();
        self.0.poll(&mut running, Waker::noop());
        let waker = lock(&self.0.waker).clone();
        self.0.poll(&mut running, &waker);
    }
}

impl TaskSet {
    /// Polls all tasks that are ready. `waker` is called when another task becomes ready later.
    fn poll(&self, running: &mut FuturesUnordered<Task>, waker: &Waker) {
        let mut cx = Context::from_waker(waker);
        loop {
            running.extend(lock(&self.spawned).drain(..));
            match Pin::new(&mut *running).poll_next(&mut cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) | Poll::Pending if lock(&self.spawned).is_empty() => return,
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
    }
}

impl hyper::rt::Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        lock(&self.0.spawned).push(task);
        lock(&self.0.waker).wake_by_ref();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{ThreadId, current};

    use hyper::rt::Executor;
    use tokio::sync::{Notify, mpsc};

    use super::*;

    /// Spawns a task that reports which thread polls it, each time the returned `Notify` wakes it.
    async fn spawn_reporter(tasks: &Tasks) -> (Arc<Notify>, mpsc::UnboundedReceiver<ThreadId>) {
        let woken = Arc::new(Notify::new());
        #[expect(
            clippy::disallowed_methods,
            reason = "the test sends only a few messages"
        )]
        let (reports, mut polled) = mpsc::unbounded_channel();
        let waits = Arc::clone(&woken);
        tasks.execute(Box::pin(async move {
            loop {
                let _ = reports.send(current().id());
                waits.notified().await;
            }
        }));
        tokio::select! {
            _ = polled.recv() => {}
            never = tasks.run() => match never {},
        }
        (woken, polled)
    }

    #[tokio::test]
    async fn a_task_woken_by_the_device_thread_is_polled_there_and_the_runtime_stays_asleep() {
        let tasks = Tasks::new();
        let (woken, mut polled) = spawn_reporter(&tasks).await;
        struct WakeCounter(AtomicUsize);
        impl std::task::Wake for WakeCounter {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let count = Arc::new(WakeCounter(AtomicUsize::new(0)));
        lock(&tasks.0.waker).clone_from(&Waker::from(Arc::clone(&count)));
        let device = tasks.clone();
        let notify = Arc::clone(&woken);
        let thread = std::thread::spawn(move || {
            device.wake_and_poll(|| notify.notify_one());
            current().id()
        });
        let thread = thread.join().expect("the spawned thread does not panic");
        assert_eq!(polled.try_recv(), Ok(thread));
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        // From now on, the runtime polls the task again.
        woken.notify_one();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_task_woken_while_the_runtime_polls_is_left_to_the_runtime() {
        let tasks = Tasks::new();
        let (woken, mut polled) = spawn_reporter(&tasks).await;
        let running = lock(&tasks.0.running);
        tasks.wake_and_poll(|| woken.notify_one());
        assert!(polled.try_recv().is_err());
        drop(running);
        tokio::select! {
            thread = polled.recv() => assert_eq!(thread, Some(current().id())),
            never = tasks.run() => match never {},
        }
    }

    #[tokio::test]
    async fn ending_the_tasks_drops_them_despite_reference_cycles() {
        let tasks = Tasks::new();
        let (woken, _polled) = spawn_reporter(&tasks).await;
        let more = tasks.clone();
        tasks.execute(Box::pin(async move {
            std::future::pending::<()>().await;
            drop(more);
        }));
        tasks.abort_all();
        assert_eq!(
            (Arc::strong_count(&woken), Arc::strong_count(&tasks.0)),
            (1, 1)
        );
    }
}
