//! Returns memory to the operating system after a load that needed much of it.
//!
//! glibc keeps freed memory in its heaps. After many large requests or slow readers, these kept more than twenty times
//! the memory that the server needs (`docs/decisions/011-allocator.md`).

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::param::page_size;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::allocator;

/// Interval between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Growth of unused memory that causes its return, in bytes. Less is kept, because a server that streams needs it
/// again.
const MIN_GROWTH_BYTES: usize = 8 * 1024 * 1024;

/// Number of checks in a row that must find this growth, so that a load that uses the memory repeatedly keeps it.
const MIN_CHECKS: u32 = 2;

/// State of the checks.
#[derive(Clone, Copy, Default)]
struct Checks {
    /// Number of checks in a row that found much unused memory.
    in_a_row: u32,
    /// Unused memory that could not be returned the last time, in bytes.
    kept: usize,
}

/// Returns unused memory whenever there has been much of it for a while, until `stop` is cancelled.
pub(super) async fn return_free_memory_regularly(stop: CancellationToken) {
    // The allocator locks each heap while it searches its free parts, so this must not run on a thread that carries
    // tokens.
    let (stopping, stopped) = mpsc::channel::<()>();
    let thread = thread::Builder::new().name("free-memory".to_owned());
    let checking = thread.spawn(move || {
        let mut checks = Checks::default();
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(CHECK_INTERVAL) {
            checks = checks.next();
        }
    });
    let checking = match checking {
        Ok(checking) => checking,
        Err(error) => {
            tracing::error!(%error, "cannot start the thread that returns unused memory");
            return;
        }
    };
    stop.cancelled().await;
    drop(stopping);
    let _ = spawn_blocking(move || checking.join()).await;
}

impl Checks {
    /// Runs a check, and returns unused memory if there is much.
    fn next(self) -> Self {
        if unused_bytes() < self.kept.saturating_add(MIN_GROWTH_BYTES) {
            return Self {
                in_a_row: 0,
                ..self
            };
        }
        if self.in_a_row + 1 < MIN_CHECKS {
            return Self {
                in_a_row: self.in_a_row + 1,
                ..self
            };
        }
        allocator::return_free_memory();
        Self {
            in_a_row: 0,
            kept: unused_bytes(),
        }
    }
}

/// Returns the resident memory that is not allocated: free memory, and memory outside the allocator, such as code.
fn unused_bytes() -> usize {
    resident_bytes().saturating_sub(allocator::used_bytes())
}

/// Returns the resident memory of this process in bytes; 0 if `/proc/self/statm` cannot be read.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0_usize).saturating_mul(page_size())
}
