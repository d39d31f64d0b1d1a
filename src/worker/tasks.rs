//! The tasks of a worker's connection. Its runtime polls them, and so does the device's thread behind each step:
//! what a step has made leaves at once, where waking another thread would take longer than to send it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker};

use futures_util::stream::FuturesUnordered;
use tokio::runtime::Handle;
use tokio_stream::Stream;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Tasks, until they are ended: what they run holds a clone of them. Clones share them.
#[derive(Clone)]
pub(super) struct Tasks(Arc<Inner>);

struct Inner {
    runtime: Handle,
    running: Mutex<FuturesUnordered<Task>>,
    /// Those that were begun since the others were polled last.
    begun: Mutex<Vec<Task>>,
    /// Wakes the runtime, once it polls them.
    waker: Mutex<Waker>,
}

impl Tasks {
    /// None yet. They are of the runtime that this is called on.
    pub(super) fn new() -> Self {
        Self(Arc::new(Inner {
            runtime: Handle::current(),
            running: Mutex::default(),
            begun: Mutex::default(),
            waker: Mutex::new(Waker::noop().clone()),
        }))
    }

    /// Polls them, for as long as this is polled.
    pub(super) async fn run(&self) -> Infallible {
        std::future::poll_fn(|cx| {
            held(&self.0.waker).clone_from(cx.waker());
            self.0.poll(&mut held(&self.0.running), cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Drops them all.
    pub(super) fn end(&self) {
        let begun = std::mem::take(&mut *held(&self.0.begun));
        let running = std::mem::take(&mut *held(&self.0.running));
        // What is dropped may ask for more to be run.
        drop((begun, running));
        held(&self.0.begun).clear();
    }

    /// Wakes one of them, and polls it on this thread. Where the runtime is polling them, that does it instead.
    pub(super) fn wake_here(&self, wake: impl FnOnce()) {
        let mut running = match self.0.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return wake(),
        };
        // The sockets that they use are the runtime's.
        let _runtime = self.0.runtime.enter();
        // As long as this thread has them nobody else need be woken.
        self.0.poll(&mut running, Waker::noop());
        wake();
        self.0.poll(&mut running, Waker::noop());
        let waker = held(&self.0.waker).clone();
        self.0.poll(&mut running, &waker);
    }
}

impl Inner {
    /// Polls those that are to be polled; the next time that there are any, `waker` is woken.
    fn poll(&self, running: &mut FuturesUnordered<Task>, waker: &Waker) {
        let mut cx = Context::from_waker(waker);
        loop {
            running.extend(held(&self.begun).drain(..));
            match Pin::new(&mut *running).poll_next(&mut cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) | Poll::Pending if held(&self.begun).is_empty() => return,
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
    }
}

impl hyper::rt::Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        held(&self.0.begun).push(task);
        held(&self.0.waker).wake_by_ref();
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{ThreadId, current};

    use hyper::rt::Executor;
    use tokio::sync::{Notify, mpsc};

    use super::*;

    /// Runs tasks, one of which tells on which thread it is polled each time that it is woken.
    async fn told(tasks: &Tasks) -> (Arc<Notify>, mpsc::UnboundedReceiver<ThreadId>) {
        let woken = Arc::new(Notify::new());
        #[expect(clippy::disallowed_methods, reason = "a test sends a few")]
        let (tells, mut polled) = mpsc::unbounded_channel();
        let waits = Arc::clone(&woken);
        tasks.execute(Box::pin(async move {
            loop {
                let _ = tells.send(current().id());
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
        let (woken, mut polled) = told(&tasks).await;
        struct Count(AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let count = Arc::new(Count(AtomicUsize::new(0)));
        held(&tasks.0.waker).clone_from(&Waker::from(Arc::clone(&count)));
        let device = tasks.clone();
        let notify = Arc::clone(&woken);
        let thread = std::thread::spawn(move || {
            device.wake_here(|| notify.notify_one());
            current().id()
        });
        let thread = thread.join().expect("it does not panic");
        assert_eq!(polled.try_recv(), Ok(thread));
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        // What happens afterwards is the runtime's again.
        woken.notify_one();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_task_woken_while_the_runtime_polls_is_left_to_the_runtime() {
        let tasks = Tasks::new();
        let (woken, mut polled) = told(&tasks).await;
        let running = held(&tasks.0.running);
        tasks.wake_here(|| woken.notify_one());
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
        let (woken, _polled) = told(&tasks).await;
        let more = tasks.clone();
        tasks.execute(Box::pin(async move {
            std::future::pending::<()>().await;
            drop(more);
        }));
        tasks.end();
        assert_eq!(
            (Arc::strong_count(&woken), Arc::strong_count(&tasks.0)),
            (1, 1)
        );
    }
}
