//! The token channel carries one sequence's tokens from the worker to the stream of its request.
//!
//! The channel holds at most as many unread tokens as the sequence has credit. While it is full, the worker skips the
//! sequence. The end of a sequence needs no credit, so even a slow reader learns how its sequence ended.

use std::cell::Cell;
use std::sync::atomic::{self, AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use metrics::Counter;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::outbox::RemoteChannel;
pub(crate) use super::sequence_output::SendOutcome;
pub use super::sequence_output::{Failure, Output};
use super::waker::WorkerWaker;
use crate::request::FinishReason;
use crate::runner::Token;
use crate::telemetry::RequestGauge;
use credit::Credit;

mod credit;
#[cfg(test)]
mod model;

/// Creates a token channel that holds at most `credit` unread tokens.
///
/// `queue` is notified if the receiver is dropped before a worker has the sequence. `wasted` counts the tokens that
/// were sent but never read.
///
/// # Panics
/// Panics if `credit` is 0.
#[must_use]
pub fn token_channel(
    credit: usize,
    queue: Arc<Notify>,
    wasted: Counter,
) -> (TokenSender, TokenReceiver) {
    assert!(
        credit > 0,
        "a token channel needs credit for at least one token"
    );
    // Two more places, for `Accepted` and for the end of the sequence, which need no credit.
    let (outputs, receiver) = mpsc::channel(credit + 2);
    let shared = Arc::new(ChannelState {
        credit: Credit::new(credit),
        has_crashed: AtomicBool::new(false),
        worker: OnceLock::new(),
        queue,
        request_gauge: OnceLock::new(),
    });
    let sender = TokenSender(TokenDestination::Local(LocalChannel {
        outputs,
        sent: Cell::new(0),
        shared: Arc::clone(&shared),
    }));
    (
        sender,
        TokenReceiver {
            receiver,
            shared,
            wasted,
        },
    )
}

struct ChannelState {
    credit: Credit,
    /// True if the channel closed without an end because its worker crashed. False if the worker was killed or became
    /// unreachable.
    has_crashed: AtomicBool,
    /// Wakes the worker that runs the sequence.
    worker: OnceLock<WorkerWaker>,
    queue: Arc<Notify>,
    /// The metrics counter of the request whose stream reads the channel.
    request_gauge: OnceLock<RequestGauge>,
}

/// The worker's end of a token channel.
pub struct TokenSender(TokenDestination);

/// The destination of the tokens.
enum TokenDestination {
    /// A stream in this process.
    Local(LocalChannel),
    /// An engine in another process.
    Remote(RemoteChannel),
}

struct LocalChannel {
    outputs: mpsc::Sender<Output>,
    /// Number of tokens sent so far.
    sent: Cell<usize>,
    shared: Arc<ChannelState>,
}

impl TokenSender {
    /// Wraps a token channel to an engine in another process.
    pub(super) fn remote(channel: RemoteChannel) -> Self {
        Self(TokenDestination::Remote(channel))
    }

    /// Returns true if the reader is gone.
    #[must_use]
    pub(crate) fn is_closed(&self) -> bool {
        match &self.0 {
            TokenDestination::Local(channel) => channel.outputs.is_closed(),
            TokenDestination::Remote(channel) => channel.is_cancelled(),
        }
    }

    /// Number of tokens that can be sent now. After a result of 0, the worker is woken when there is room again.
    #[must_use]
    pub(crate) fn credit(&self) -> usize {
        match &self.0 {
            TokenDestination::Local(channel) => channel.credit(),
            TokenDestination::Remote(channel) => channel.credit(),
        }
    }

    /// Reports that a worker has accepted the sequence, and that it reuses `cached_tokens` tokens of the prompt.
    pub(crate) fn accept(&self, cached_tokens: u32) -> SendOutcome {
        match &self.0 {
            TokenDestination::Local(channel) => {
                channel.send(0, || Output::Accepted { cached_tokens })
            }
            TokenDestination::Remote(channel) => channel.accept(cached_tokens),
        }
    }

    /// Sends the next token of the prompt.
    pub(crate) fn send_prompt_token(&self, token: Token) -> SendOutcome {
        match &self.0 {
            TokenDestination::Local(channel) => channel.send(1, || Output::Prompt(token)),
            TokenDestination::Remote(channel) => channel.send_prompt_token(token),
        }
    }

    /// Sends the next token of the completion.
    pub(crate) fn send_token(&self, token: Token) -> SendOutcome {
        match &self.0 {
            TokenDestination::Local(channel) => channel.send(1, || Output::Token(token)),
            TokenDestination::Remote(channel) => channel.send_token(token),
        }
    }

    /// Sends several completion tokens together. On `NoCredit`, some of them may have been sent.
    pub(super) fn send_tokens(
        &self,
        mut tokens: impl ExactSizeIterator<Item = Token>,
    ) -> SendOutcome {
        match &self.0 {
            TokenDestination::Local(channel) => {
                channel.send(tokens.len(), || match (tokens.len(), tokens.next()) {
                    (1, Some(token)) => Output::Token(token),
                    (_, first) => Output::Tokens(first.into_iter().chain(tokens).collect()),
                })
            }
            TokenDestination::Remote(channel) => tokens
                .find_map(|token| {
                    Some(channel.send_token(token)).filter(|sent| *sent != SendOutcome::Delivered)
                })
                .unwrap_or(SendOutcome::Delivered),
        }
    }

    /// Ends the sequence successfully. `token` is its last token, if that was not sent before.
    pub(crate) fn finish(self, token: Option<Token>, reason: FinishReason) {
        match self.0 {
            TokenDestination::Local(channel) => {
                channel.end(Output::Finished(token, reason));
            }
            TokenDestination::Remote(channel) => channel.finish(token, reason),
        }
    }

    /// Ends the sequence with a failure.
    pub(crate) fn fail(self, failure: Failure) {
        match self.0 {
            TokenDestination::Local(channel) => {
                channel.end(Output::Failed(failure));
            }
            TokenDestination::Remote(channel) => channel.fail(&failure),
        }
    }

    /// Closes the channel without an end, and records that its worker crashed. Dropping the sender also closes the
    /// channel without an end, but does not record a crash.
    pub(super) fn crash(self) {
        match self.0 {
            TokenDestination::Local(channel) => {
                channel.shared.has_crashed.store(true, Ordering::SeqCst)
            }
            // A single `Crashed` message tells the engine that all sequences of this worker are lost.
            TokenDestination::Remote(_) => {}
        }
    }

    /// Sets the worker that the reader wakes. Only the first call has an effect.
    pub(super) fn set_worker(&self, worker: WorkerWaker) {
        match &self.0 {
            // A sequence is placed on one worker only. If that worker is lost, this sender is dropped.
            TokenDestination::Local(channel) => drop(channel.shared.worker.set(worker)),
            TokenDestination::Remote(_) => {}
        }
    }
}

impl LocalChannel {
    fn credit(&self) -> usize {
        self.shared
            .credit
            .available_or_request_wake(self.sent.get())
    }

    /// Sends an output that needs `tokens` credit.
    fn send(&self, tokens: usize, output: impl FnOnce() -> Output) -> SendOutcome {
        if self.shared.credit.available(self.sent.get()) < tokens {
            return SendOutcome::NoCredit;
        }
        self.sent.set(self.sent.get() + tokens);
        match self.outputs.try_send(output()) {
            Ok(()) => SendOutcome::Delivered,
            Err(TrySendError::Closed(_)) => SendOutcome::Closed,
            Err(TrySendError::Full(_)) => SendOutcome::NoCredit,
        }
    }

    fn end(self, output: Output) {
        if let Output::Failed(Failure::SlowReader) = output
            && let Some(request_gauge) = self.shared.request_gauge.get()
        {
            request_gauge.linger();
        }
        // Sending fails if the reader is gone. The end is then of no use.
        let _ = self.outputs.try_send(output);
    }
}

/// The reader's end of a token channel. Dropping it cancels the sequence, whether the sequence is queued or running.
pub struct TokenReceiver {
    receiver: mpsc::Receiver<Output>,
    shared: Arc<ChannelState>,
    wasted: Counter,
}

impl TokenReceiver {
    /// Receives up to `limit` outputs; waits if there are none. Returns 0 once the channel is closed and empty.
    pub fn poll_recv_many(
        &mut self,
        cx: &mut Context<'_>,
        outputs: &mut Vec<Output>,
        limit: usize,
    ) -> Poll<usize> {
        let before = outputs.len();
        let received = self.receiver.poll_recv_many(cx, outputs, limit);
        if received.is_ready() {
            self.return_credit(outputs[before..].iter().map(Output::credit).sum());
        }
        received
    }

    /// Sets the metrics counter of the request that reads this channel. If the sequence ends with `SlowReader`, the
    /// sender marks the request as lingering, because its client may not read the error for a long time.
    pub(crate) fn set_request_gauge(&self, request_gauge: RequestGauge) {
        // One request reads a channel for its whole life, so a gauge that is already set is the right one.
        let _ = self.shared.request_gauge.set(request_gauge);
    }

    /// Takes the metrics counter from the channel that this channel replaces after a resumption.
    pub(crate) fn inherit_request_gauge(&self, lost: &Self) {
        if let Some(request_gauge) = lost.shared.request_gauge.get() {
            self.set_request_gauge(request_gauge.clone());
        }
    }

    /// Returns true if the channel closed without an end because its worker crashed.
    #[must_use]
    pub(crate) fn has_crashed(&self) -> bool {
        self.shared.has_crashed.load(Ordering::SeqCst)
    }

    fn return_credit(&self, tokens: usize) {
        if self.shared.credit.give_back(tokens)
            && let Some(worker) = self.shared.worker.get()
        {
            worker.wake();
        }
    }
}

impl Drop for TokenReceiver {
    fn drop(&mut self) {
        self.receiver.close();
        while let Ok(output) = self.receiver.try_recv() {
            let wasted = u64::try_from(output.completion_tokens().len()).unwrap_or(u64::MAX);
            self.wasted.increment(wasted);
        }
        match self.shared.worker.get() {
            Some(worker) => worker.wake(),
            None => self.shared.queue.notify_one(),
        }
    }
}

#[cfg(test)]
mod tests;
