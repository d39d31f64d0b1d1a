//! Concurrency checks of the credit with shuttle: every order in which a worker and a reader can run.
//!
//! tokio's channel is trusted, and shuttle's stands in for it. The worker waits as in `worker/thread.rs`, and is woken
//! as in `WorkerWaker`. shuttle takes every atomic as sequentially consistent, which those of the credit are.

use std::sync::atomic::AtomicUsize as Counter;

use shuttle::check_dfs;
use shuttle::sync::Arc;
use shuttle::sync::atomic;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use shuttle::thread;

use credit::Credit;

#[expect(
    clippy::duplicate_mod,
    reason = "the model runs the same code with shuttle's atomics"
)]
#[path = "credit.rs"]
mod credit;

/// Most unread tokens. More would need a hundred times as many orders, and show the same.
const LIMIT: usize = 1;

/// The state that the worker and the reader share.
struct Shared {
    credit: Credit,
    is_closed: AtomicBool,
    attention: AtomicBool,
    /// Number of tokens on the channel. It is no part of the model.
    unread: Counter,
}

struct Worker {
    shared: Arc<Shared>,
    tokens: Sender<usize>,
    /// Receives when the worker is unparked.
    unparked: Receiver<()>,
}

struct Reader {
    shared: Arc<Shared>,
    tokens: Receiver<usize>,
    /// Has room for one message, like the token of `Thread::unpark`.
    worker: SyncSender<()>,
}

fn new_channel() -> (Worker, Reader) {
    let shared = Arc::new(Shared {
        credit: Credit::new(LIMIT),
        is_closed: AtomicBool::new(false),
        attention: AtomicBool::new(false),
        unread: Counter::new(0),
    });
    let (sender, receiver) = channel();
    let (unpark, unparked) = sync_channel(1);
    let worker = Worker {
        shared: Arc::clone(&shared),
        tokens: sender,
        unparked,
    };
    let reader = Reader {
        shared,
        tokens: receiver,
        worker: unpark,
    };
    (worker, reader)
}

impl Worker {
    /// Sends `count` tokens as it gets credit for them. Returns early when the reader is gone.
    fn send(&self, count: usize) -> usize {
        let mut sent = 0;
        while sent < count {
            self.shared.attention.swap(false, Ordering::SeqCst);
            if self.shared.is_closed.load(Ordering::SeqCst) {
                break;
            }
            match self.shared.credit.available_or_request_wake(sent) {
                0 => self.wait(),
                free => {
                    let step = free.min(count - sent);
                    sent += step;
                    let unread = self.shared.unread.fetch_add(step, Ordering::SeqCst);
                    assert!(unread + step <= LIMIT, "more unread tokens than credit");
                    // The reader may be gone.
                    let _ = self.tokens.send(step);
                }
            }
        }
        sent
    }

    fn wait(&self) {
        while !self.shared.attention.load(Ordering::SeqCst) {
            self.unparked.recv().expect("the test holds the sender");
        }
    }
}

impl Reader {
    fn take(&self, count: usize) {
        let mut taken = 0;
        while taken < count {
            let tokens = self.tokens.recv().expect("the worker sends every token");
            self.shared.unread.fetch_sub(tokens, Ordering::SeqCst);
            taken += tokens;
            if self.shared.credit.give_back(tokens) {
                self.wake();
            }
        }
    }

    fn close(&self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        self.shared.attention.store(true, Ordering::SeqCst);
        // If the channel is full, a wake-up is already pending.
        let _ = self.worker.try_send(());
    }
}

#[test]
fn a_worker_without_credit_is_woken_when_the_reader_takes_tokens_and_none_is_lost() {
    const COUNT: usize = 2;
    let model = || {
        let (worker, reader) = new_channel();
        let shared = Arc::clone(&worker.shared);
        let reader = thread::spawn(move || {
            reader.take(COUNT);
            reader
        });
        // A lost wake-up leaves both threads waiting, which shuttle reports as a deadlock.
        assert_eq!(worker.send(COUNT), COUNT);
        reader.join().expect("the reader does not panic");
        assert_eq!(shared.credit.available(COUNT), LIMIT, "all credit is back");
    };
    check_dfs(model, None);
}

#[test]
fn a_worker_without_credit_is_woken_when_the_reader_is_dropped() {
    let model = || {
        let (worker, reader) = new_channel();
        let reader = thread::spawn(move || {
            reader.close();
            reader
        });
        let sent = worker.send(usize::MAX);
        assert!(sent <= LIMIT, "{sent} tokens");
        reader.join().expect("the reader does not panic");
    };
    check_dfs(model, None);
}
