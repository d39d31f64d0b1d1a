//! The token channel: it carries one sequence's tokens from the worker to the stream of its request.
//!
//! The channel holds at most as many unread tokens as the sequence has credit. While it is full, the worker skips the
//! sequence. The end of a sequence takes no credit, so a slow reader still learns how its sequence ended.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use metrics::Counter;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::WorkerWaker;
use super::outbox::RemoteChannel;
use crate::request::FinishReason;
use crate::runner::{ModelError, Token};
use crate::telemetry::StreamCount;

/// A message on a token channel. A sequence sends them in the order of these variants.
#[derive(Debug)]
pub enum Output {
    /// A worker has accepted the sequence.
    Accepted,
    /// The next token of the prompt.
    Prompt(Token),
    /// The next token of the completion.
    Token(Token),
    /// The next tokens of the completion, from one step.
    Tokens(Vec<Token>),
    /// The sequence finished. The token is the last one, unless that was sent before.
    Finished(Option<Token>, FinishReason),
    /// The sequence failed.
    Failed(Failure),
}

/// The reason why a worker ended a sequence early. A crash sends no failure: the channel closes without an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The model rejected the sequence or failed on it.
    Model(ModelError),
    /// The reader made no progress within the slow-reader timeout.
    SlowReader,
    /// The deadline passed.
    DeadlineExceeded,
    /// The server is shutting down.
    Draining,
}

/// Creates a channel that holds at most `credit` unread tokens.
///
/// `queue` is notified if the receiver is dropped before a worker has the sequence. `wasted` counts the tokens that
/// were sent and never read.
///
/// # Panics
/// When `credit` is 0.
#[must_use]
pub fn token_channel(
    credit: usize,
    queue: Arc<Notify>,
    wasted: Counter,
) -> (TokenSender, TokenReceiver) {
    assert!(
        credit > 0,
        "a channel without credit can never carry a token"
    );
    // Only `Accepted` and the end carry no token.
    let (outputs, receiver) = mpsc::channel(credit + 2);
    let shared = Arc::new(Shared {
        credit,
        taken: AtomicUsize::new(0),
        stalled: AtomicBool::new(false),
        has_crashed: AtomicBool::new(false),
        worker: OnceLock::new(),
        queue,
        stream: OnceLock::new(),
    });
    let sender = TokenSender(Route::Local(LocalChannel {
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

struct Shared {
    /// Most unread tokens on the channel.
    credit: usize,
    /// Number of tokens that the reader has taken so far.
    taken: AtomicUsize,
    /// Set while the channel is full. The reader then wakes the worker once it has made room.
    stalled: AtomicBool,
    /// The channel closed without an end because its worker crashed. False if the worker was killed or became
    /// unreachable.
    has_crashed: AtomicBool,
    /// Wakes the worker that has the sequence.
    worker: OnceLock<WorkerWaker>,
    queue: Arc<Notify>,
    /// Counts the reading stream in the metrics.
    stream: OnceLock<StreamCount>,
}

/// The worker's half of a token channel.
pub struct TokenSender(Route);

/// The destination of a token channel.
enum Route {
    /// A stream in this process.
    Local(LocalChannel),
    /// The engine in another process.
    Remote(RemoteChannel),
}

struct LocalChannel {
    outputs: mpsc::Sender<Output>,
    /// Number of tokens sent so far.
    sent: Cell<usize>,
    shared: Arc<Shared>,
}

/// The result of sending an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// The output is on the channel.
    Delivered,
    /// The reader is gone.
    Closed,
    /// The channel has no credit left for it.
    NoCredit,
}

impl TokenSender {
    /// Wraps a channel to an engine in another process.
    pub(super) fn remote(channel: RemoteChannel) -> Self {
        Self(Route::Remote(channel))
    }

    /// Returns true if the reader is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match &self.0 {
            Route::Local(channel) => channel.outputs.is_closed(),
            Route::Remote(channel) => channel.is_cancelled(),
        }
    }

    /// Number of tokens that can be sent now. If it is 0, the worker is woken once there is room again.
    #[must_use]
    pub fn credit(&self) -> usize {
        match &self.0 {
            Route::Local(channel) => channel.credit(),
            Route::Remote(channel) => channel.credit(),
        }
    }

    /// Reports that a worker has accepted the sequence.
    pub fn accept(&self) -> SendOutcome {
        match &self.0 {
            Route::Local(channel) => channel.send(0, || Output::Accepted),
            Route::Remote(channel) => channel.accept(),
        }
    }

    /// Sends the next token of the prompt.
    pub fn prompt(&self, token: Token) -> SendOutcome {
        match &self.0 {
            Route::Local(channel) => channel.send(1, || Output::Prompt(token)),
            Route::Remote(channel) => channel.prompt(token),
        }
    }

    /// Sends the next token of the completion.
    pub fn token(&self, token: Token) -> SendOutcome {
        match &self.0 {
            Route::Local(channel) => channel.send(1, || Output::Token(token)),
            Route::Remote(channel) => channel.token(token),
        }
    }

    /// Sends the next tokens of the completion together. On `NoCredit`, some of them may have been sent.
    pub(super) fn tokens(&self, mut tokens: impl ExactSizeIterator<Item = Token>) -> SendOutcome {
        match &self.0 {
            Route::Local(channel) => {
                channel.send(tokens.len(), || match (tokens.len(), tokens.next()) {
                    (1, Some(token)) => Output::Token(token),
                    (_, first) => Output::Tokens(first.into_iter().chain(tokens).collect()),
                })
            }
            Route::Remote(channel) => tokens
                .find_map(|token| {
                    Some(channel.token(token)).filter(|sent| *sent != SendOutcome::Delivered)
                })
                .unwrap_or(SendOutcome::Delivered),
        }
    }

    /// Ends the sequence successfully. `token` is its last token, unless that was sent before.
    pub fn finish(self, token: Option<Token>, reason: FinishReason) {
        match self.0 {
            Route::Local(channel) => {
                channel.end(Output::Finished(token, reason));
            }
            Route::Remote(channel) => channel.finish(token, reason),
        }
    }

    /// Ends the sequence with a failure.
    pub fn fail(self, failure: Failure) {
        match self.0 {
            Route::Local(channel) => {
                channel.end(Output::Failed(failure));
            }
            Route::Remote(channel) => channel.fail(&failure),
        }
    }

    /// Closes the channel without an end, and records that its worker crashed. Dropping the sender also closes the
    /// channel, but records no crash.
    pub(super) fn crash(self) {
        match self.0 {
            Route::Local(channel) => channel.shared.has_crashed.store(true, Ordering::SeqCst),
            // One `Crashed` message tells the engine about all sequences of this worker.
            Route::Remote(_) => {}
        }
    }

    /// Sets the worker that the reader wakes. Later calls have no effect.
    pub(super) fn set_worker(&self, worker: WorkerWaker) {
        match &self.0 {
            // A sequence is placed on one worker only. A worker that loses it drops this sender.
            Route::Local(channel) => drop(channel.shared.worker.set(worker)),
            Route::Remote(_) => {}
        }
    }
}

impl LocalChannel {
    fn credit(&self) -> usize {
        match self.free() {
            0 => self.stall(),
            credit => credit,
        }
    }

    fn free(&self) -> usize {
        // Only this thread sends, so the room cannot shrink between this check and the send.
        let unread = self.sent.get() - self.shared.taken.load(Ordering::SeqCst);
        self.shared.credit - unread
    }

    /// Asks to be woken, and then checks again. A reader that makes room at this moment either sees the flag, or has
    /// made the room that this check finds.
    fn stall(&self) -> usize {
        self.shared.stalled.store(true, Ordering::SeqCst);
        self.free()
    }

    /// Sends an output that takes `tokens` credit.
    fn send(&self, tokens: usize, output: impl FnOnce() -> Output) -> SendOutcome {
        if self.free() < tokens {
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
            && let Some(stream) = self.shared.stream.get()
        {
            stream.linger();
        }
        // If the reader is gone, nobody needs the end.
        let _ = self.outputs.try_send(output);
    }
}

impl Output {
    /// The completion tokens in this output.
    pub fn completion_tokens(&self) -> &[Token] {
        match self {
            Self::Token(token) | Self::Finished(Some(token), _) => std::slice::from_ref(token),
            Self::Tokens(tokens) => tokens,
            Self::Accepted | Self::Prompt(_) | Self::Finished(None, _) | Self::Failed(_) => &[],
        }
    }

    /// Credit that this output takes.
    fn credit(&self) -> usize {
        match self {
            Self::Prompt(_) | Self::Token(_) => 1,
            Self::Tokens(tokens) => tokens.len(),
            Self::Accepted | Self::Finished(..) | Self::Failed(_) => 0,
        }
    }
}

/// The reader's half of a token channel. Dropping it cancels the sequence, whether queued or running.
pub struct TokenReceiver {
    receiver: mpsc::Receiver<Output>,
    shared: Arc<Shared>,
    wasted: Counter,
}

impl TokenReceiver {
    /// Receives up to `limit` outputs; waits if there are none. Ready with 0 when the channel is closed and empty.
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

    /// Sets the stream's metrics counter. The sender marks the stream as lingering when the sequence ends with
    /// `SlowReader`, because such a reader may not read that end for a long time.
    pub fn set_stream_count(&self, stream: StreamCount) {
        // The stream of a channel never changes.
        let _ = self.shared.stream.set(stream);
    }

    /// Takes over the metrics counter of the channel that this one replaces.
    pub fn inherit_stream_count(&self, lost: &Self) {
        if let Some(stream) = lost.shared.stream.get() {
            self.set_stream_count(stream.clone());
        }
    }

    /// Returns true if the channel closed without an end because its worker crashed.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.shared.has_crashed.load(Ordering::SeqCst)
    }

    fn return_credit(&self, tokens: usize) {
        self.shared.taken.fetch_add(tokens, Ordering::SeqCst);
        if self.shared.stalled.swap(false, Ordering::SeqCst)
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
