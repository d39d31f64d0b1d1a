//! State of a session: while the worker's model is loaded, and from one load to the next.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::runner::monotonic_ns;
use crate::telemetry::PrefixCacheMeter;
use crate::worker::Generation;
use crate::worker::attached::remote_tokenizer::TokenizerCall;
use crate::worker::attached::sequences::Sequences;
use crate::worker::attached::tokenizer_calls::TokenizerCalls;
use crate::worker::wire::SequenceId;

/// The state of a worker while its model is loaded.
pub(super) struct LoadedState {
    pub(super) generation: Generation,
    pub(super) sequences: Sequences,
    pub(super) call_requests: mpsc::Receiver<TokenizerCall>,
    pub(super) calls: TokenizerCalls,
    /// Number of this session's sequences that the gauge counts.
    pub(super) counted: f64,
    pub(super) prefix_cache: PrefixCacheMeter,
}

/// State of a session that outlives the worker's generations.
#[derive(Default)]
pub(super) struct SessionHistory {
    /// Number of loads on this stream, which the engine uses as the generation.
    pub(super) generations: u64,
    /// `ready.generation` of the latest load, and number of the latest sequence.
    pub(super) last: SequenceId,
    /// Number of the latest tokenizer call.
    pub(super) last_call: u64,
}

impl LoadedState {
    /// Returns true if the worker has not answered its tokenizer calls for too long.
    pub(super) fn is_unresponsive(&self) -> bool {
        self.calls
            .unresponsive_at()
            .is_some_and(|at| at <= Instant::now())
    }

    /// Returns the time of the next check of the sequences and the tokenizer calls, or `None` if there is nothing to
    /// check.
    pub(super) fn next_check(&self) -> Option<Instant> {
        let checks = [self.next_sweep(), self.calls.unresponsive_at()];
        checks.into_iter().flatten().min()
    }

    fn next_sweep(&self) -> Option<Instant> {
        let at_ns = self.sequences.next_sweep_ns();
        if at_ns == u64::MAX {
            return None;
        }
        let left_ns = at_ns.saturating_sub(monotonic_ns());
        Instant::now().checked_add(Duration::from_nanos(left_ns))
    }
}
