//! Limits the memory of large requests and responses, on both APIs together. This module must not know how a request
//! arrives.
//!
//! There are three pools of the same size: for bodies that are being read, for parsed requests, and for responses
//! without `stream`. A request waits for a share of a pool before it uses the memory. Only a response that becomes
//! larger than expected waits for more of a pool while it holds a share of the same pool. Such responses can block each
//! other, but for no longer than `MAX_WAIT`, the limit of every wait.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind};

/// Size up to which a body needs no share, in bytes. A thousand such bodies fit into 64 MiB.
pub(crate) const UNCOUNTED_BODY_BYTES: u64 = 64 * 1024;

/// Largest body of both APIs, in bytes.
pub(crate) const MAX_BODY_BYTES: u64 = 4 * 1024 * 1024;

/// Size up to which a response needs no share, in bytes.
const UNCOUNTED_RESPONSE_BYTES: u64 = 256 * 1024;

/// Kind of work that a parsed request causes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// Completions.
    Completion,
    /// Tokens of a text, or the text of tokens.
    Tokenizer,
}

impl Work {
    /// Returns the memory that the work needs, as a multiple of the size of the body. Measured with two million token
    /// ids in a body of 4 MiB, in lists that grow by doubling: 28 MiB when parsed, and 60 MiB with the text of the
    /// tokens.
    fn memory_per_body_byte(self) -> u64 {
        match self {
            Self::Completion => 8,
            Self::Tokenizer => 16,
        }
    }
}

/// Memory of a parsed completion request that waits in the queue, as a multiple of the size of the body.
const QUEUED_PER_BODY_BYTE: u64 = 3;

/// Memory that a response needs, as a multiple of its size: one for its collected parts, and one for its JSON.
const MEMORY_PER_RESPONSE_BYTE: u64 = 2;

/// Maximum wait for a share. It is shorter than the usual timeouts of clients, which then retry.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Bytes of one permit of a semaphore.
const BYTES_PER_PERMIT: u64 = 1_024;

/// Memory for large requests and responses. Clones share it.
#[derive(Clone)]
pub struct RequestMemory {
    bodies: Pool,
    requests: Pool,
    responses: Pool,
}

#[derive(Clone)]
struct Pool {
    free: Arc<Semaphore>,
    permits: u32,
}

impl RequestMemory {
    /// Creates pools of this size each, but not smaller than the largest body.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let [bodies, requests, responses] = [(); 3].map(|()| Pool::new(bytes));
        Self {
            bodies,
            requests,
            responses,
        }
    }
}

impl Pool {
    fn new(bytes: u64) -> Self {
        let permits = bytes.max(MAX_BODY_BYTES) / BYTES_PER_PERMIT;
        let permits = u32::try_from(permits).unwrap_or(u32::MAX);
        let free = usize::try_from(permits).unwrap_or(usize::MAX);
        Self {
            free: Arc::new(Semaphore::new(free.min(Semaphore::MAX_PERMITS))),
            permits,
        }
    }

    /// Waits for a share of this size, or for the whole pool if it is smaller.
    async fn wait(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Error> {
        self.wait_for_permits(self.permits(bytes)).await
    }

    /// Returns the number of permits for this size. It is at most that of the whole pool.
    fn permits(&self, bytes: u64) -> u32 {
        let permits = u32::try_from(bytes.div_ceil(BYTES_PER_PERMIT)).unwrap_or(u32::MAX);
        permits.min(self.permits)
    }

    async fn wait_for_permits(&self, permits: u32) -> Result<OwnedSemaphorePermit, Error> {
        let free = Arc::clone(&self.free);
        match timeout(MAX_WAIT, free.acquire_many_owned(permits)).await {
            Ok(permit) => Ok(permit.expect("the semaphore is never closed")),
            Err(_) => {
                let message = "The server holds too many large requests. Retry later.";
                Err(Error::new(ErrorKind::QueueFull, message))
            }
        }
    }
}

/// The shares of one request.
pub(crate) struct MemoryShares {
    memory: RequestMemory,
    /// Share of the body, or of the parsed request.
    of_request: Mutex<Option<OwnedSemaphorePermit>>,
    /// Number of prompts of the request that no worker has started.
    waiting_prompts: AtomicUsize,
    of_response: Mutex<Option<OwnedSemaphorePermit>>,
}

impl MemoryShares {
    pub(crate) fn new(memory: RequestMemory) -> Self {
        Self {
            memory,
            of_request: Mutex::default(),
            waiting_prompts: AtomicUsize::new(1),
            of_response: Mutex::default(),
        }
    }

    /// Waits for memory to read a body of this size.
    ///
    /// # Errors
    /// No memory has become free.
    pub(crate) async fn wait_for_body(&self, bytes: u64) -> Result<(), Error> {
        let share = self.memory.bodies.wait(bytes).await?;
        *lock(&self.of_request) = Some(share);
        Ok(())
    }

    /// Waits for memory to parse a body of this size, and to hold the request until [`Self::release_request`]. The
    /// share of the body becomes free.
    ///
    /// # Errors
    /// No memory has become free.
    pub(crate) async fn wait_for_request(&self, work: Work, body_bytes: u64) -> Result<(), Error> {
        let bytes = body_bytes.saturating_mul(work.memory_per_body_byte());
        let share = self.memory.requests.wait(bytes).await?;
        *lock(&self.of_request) = Some(share);
        Ok(())
    }

    /// Gives back the part of the request's share that only parsing needed.
    pub(crate) fn finish_parsing(&self, body_bytes: u64) {
        let permits = self
            .memory
            .requests
            .permits(body_bytes.saturating_mul(QUEUED_PER_BODY_BYTE));
        let permits = usize::try_from(permits).unwrap_or(usize::MAX);
        let mut of_request = lock(&self.of_request);
        if let Some(share) = &mut *of_request
            && let Some(unneeded) = share.num_permits().checked_sub(permits)
        {
            drop(share.split(unneeded));
        }
    }

    /// Waits for memory to collect a response of this size in all, and to hold it until the request ends.
    ///
    /// # Errors
    /// No memory has become free.
    pub(crate) async fn wait_for_response(&self, bytes: u64) -> Result<(), Error> {
        if bytes <= UNCOUNTED_RESPONSE_BYTES {
            return Ok(());
        }
        let pool = &self.memory.responses;
        let permits = pool.permits(bytes.saturating_mul(MEMORY_PER_RESPONSE_BYTE));
        let held = lock(&self.of_response)
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        let held = u32::try_from(held).unwrap_or(u32::MAX);
        // A response that is larger than the pool gets all of it.
        let Some(more) = permits.checked_sub(held).filter(|more| *more > 0) else {
            return Ok(());
        };
        let share = pool.wait_for_permits(more).await?;
        match &mut *lock(&self.of_response) {
            Some(held) => held.merge(share),
            none => *none = Some(share),
        }
        Ok(())
    }

    /// Sets the number of prompts that workers must start before the memory of the parsed request is free.
    pub(crate) fn set_prompts(&self, prompts: usize) {
        self.waiting_prompts.store(prompts, Ordering::Relaxed);
    }

    /// Frees the share of the parsed request, if a worker has now started the last of its prompts.
    pub(crate) fn record_start(&self) {
        let counted =
            self.waiting_prompts
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(1));
        if counted == Ok(1) {
            self.release_request();
        }
    }

    /// Frees the share of the body or of the parsed request.
    pub(crate) fn release_request(&self) {
        *lock(&self.of_request) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn shares(memory: &RequestMemory) -> MemoryShares {
        MemoryShares::new(memory.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn a_parsed_request_gives_back_the_share_of_its_body() {
        let memory = RequestMemory::new(16 * MIB);
        let (first, second) = (shares(&memory), shares(&memory));
        first.wait_for_body(16 * MIB).await.unwrap();
        let mut waiting = Box::pin(second.wait_for_body(MIB));
        assert!((&mut waiting).now_or_never().is_none());
        first
            .wait_for_request(Work::Completion, 2 * MIB)
            .await
            .unwrap();
        waiting.await.unwrap();
        // The parsed request needs eight times the size of its body, which is all, and less than half of it afterwards.
        first.set_prompts(2);
        let mut waiting = Box::pin(second.wait_for_request(Work::Tokenizer, MIB));
        assert!((&mut waiting).now_or_never().is_none());
        first.finish_parsing(2 * MIB);
        assert!((&mut waiting).now_or_never().is_none(), "it needs all");
        first.record_start();
        assert!((&mut waiting).now_or_never().is_none(), "one prompt waits");
        first.record_start();
        waiting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_response_waits_for_another_one_to_end() {
        let memory = RequestMemory::new(16 * MIB);
        let (first, second) = (shares(&memory), shares(&memory));
        first.wait_for_response(3 * MIB).await.unwrap();
        first.wait_for_response(2 * MIB).await.unwrap();
        first.wait_for_response(8 * MIB).await.unwrap();
        second.wait_for_response(256 * 1024).await.unwrap();
        let rejected = second.wait_for_response(MIB).await.unwrap_err();
        assert_eq!(rejected.kind, ErrorKind::QueueFull);
        assert!(rejected.retry_after.is_some());
        drop(first);
        // A response that is larger than the pool gets all of it, also if it has a part of it already.
        second.wait_for_response(MIB).await.unwrap();
        second.wait_for_response(64 * MIB).await.unwrap();
        second.wait_for_response(128 * MIB).await.unwrap();
    }
}
