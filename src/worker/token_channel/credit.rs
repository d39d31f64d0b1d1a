//! The credit of a token channel: how many tokens may be sent now, and when the reader has to wake the worker.
//!
//! It consists of atomics alone, and names them through its parent: `model.rs` checks it with those of shuttle, in every
//! order in which two threads can run it. It must not know tokens or wakers.

use super::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The credit that a worker and the reader of one sequence share.
pub(super) struct Credit {
    /// Maximum number of unread tokens on the channel.
    limit: usize,
    /// Number of tokens that the reader has taken so far.
    taken: AtomicUsize,
    /// Set while the channel is full. When the reader has made room, it wakes the worker.
    stalled: AtomicBool,
}

impl Credit {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            taken: AtomicUsize::new(0),
            stalled: AtomicBool::new(false),
        }
    }

    /// Number of tokens that can be sent now, after `sent` tokens. Only the caller sends, so the room cannot shrink
    /// until it does.
    pub(super) fn available(&self, sent: usize) -> usize {
        let unread = sent - self.taken.load(Ordering::SeqCst);
        self.limit - unread
    }

    /// Number of tokens that can be sent now, after `sent` tokens. If it is 0, the reader wakes the worker once it has
    /// made room.
    pub(super) fn available_or_request_wake(&self, sent: usize) -> usize {
        match self.available(sent) {
            0 => self.request_wake(sent),
            free => free,
        }
    }

    /// Requests a wake-up, and then checks for room again. A reader that makes room at this moment either sees the
    /// request, or has made the room before the second check.
    pub(super) fn request_wake(&self, sent: usize) -> usize {
        self.stalled.store(true, Ordering::SeqCst);
        self.available(sent)
    }

    /// Returns the credit of tokens that the reader has taken. Returns true if the caller has to wake the worker.
    #[must_use]
    pub(super) fn give_back(&self, tokens: usize) -> bool {
        self.taken.fetch_add(tokens, Ordering::SeqCst);
        self.stalled.swap(false, Ordering::SeqCst)
    }
}
