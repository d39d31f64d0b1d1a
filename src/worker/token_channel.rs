//! The way of one sequence's tokens, from the worker straight to the stream of its request. As many tokens as the
//! sequence has credit can be on it, and then the worker waits for its reader.
//!
//! The end of a sequence takes no credit, so that a reader that has stopped reading is still told how it ended.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use metrics::Counter;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, error::TrySendError};

use super::Wake;
use super::outbox::RemoteChannel;
use crate::request::FinishReason;
use crate::runner::{ModelError, Token};
use crate::telemetry::StreamCount;

/// What a stream receives of one of its sequences, in this order.
#[derive(Debug)]
pub enum Output {
    /// A worker has taken the sequence.
    Accepted,
    /// The next token of the prompt.
    Prompt(Token),
    /// The next token.
    Token(Token),
    /// The next tokens, which came together.
    Tokens(Vec<Token>),
    /// The end, with the last token where it was known to be the last when it was made.
    Finished(Option<Token>, FinishReason),
    /// The end, with no success.
    Failed(Failure),
}

/// Why a worker gave up a sequence. A worker that crashes says nothing: its lanes just close.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The model refused it or failed on it.
    Model(ModelError),
    /// Its reader made no progress for too long.
    SlowReader,
    /// Its deadline passed.
    DeadlineExceeded,
    /// The server is shutting down and waited long enough.
    Draining,
}

/// A token_channel on which the sequence can run `credit` tokens ahead of its reader.
///
/// `queue` is notified when the reader goes away before a worker has the sequence; `wasted` counts
/// the tokens that nobody read.
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
        "a token_channel without credit could never move"
    );
    // Every output has a token but its first and its last.
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
    let sender = TokenSender(Way::Here(LocalChannel {
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
    /// How many tokens may be on the token_channel.
    credit: usize,
    /// How many the reader has taken.
    taken: AtomicUsize,
    /// Whether the worker passes the sequence over until there is credit again.
    stalled: AtomicBool,
    /// Whether the token_channel closed without an end because its worker crashed, rather than that it was killed or
    /// could not be reached any more.
    has_crashed: AtomicBool,
    /// The worker that has the sequence.
    worker: OnceLock<Wake>,
    queue: Arc<Notify>,
    /// The stream that reads the token_channel, as the metrics count it.
    stream: OnceLock<StreamCount>,
}

/// The worker's end.
pub struct TokenSender(Way);

/// Where a token_channel leads.
enum Way {
    /// To a stream of this process.
    Here(LocalChannel),
    /// To an engine elsewhere.
    Elsewhere(RemoteChannel),
}

struct LocalChannel {
    outputs: mpsc::Sender<Output>,
    /// How many tokens were sent.
    sent: Cell<usize>,
    shared: Arc<Shared>,
}

/// What became of a token that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// Its reader will have it.
    Delivered,
    /// The reader is gone.
    Closed,
    /// There was no credit for it.
    NoRoom,
}

impl TokenSender {
    /// A token_channel to an engine elsewhere.
    pub(super) fn elsewhere(token_channel: RemoteChannel) -> Self {
        Self(Way::Elsewhere(token_channel))
    }

    /// Whether the reader is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match &self.0 {
            Way::Here(token_channel) => token_channel.outputs.is_closed(),
            Way::Elsewhere(token_channel) => token_channel.is_cancelled(),
        }
    }

    /// How many more tokens the reader has credit for. At 0, the worker is woken when that changes.
    #[must_use]
    pub fn credit(&self) -> usize {
        match &self.0 {
            Way::Here(token_channel) => token_channel.credit(),
            Way::Elsewhere(token_channel) => token_channel.credit(),
        }
    }

    /// Says that a worker has the sequence now.
    pub fn accept(&self) -> SendOutcome {
        match &self.0 {
            Way::Here(token_channel) => token_channel.send(0, || Output::Accepted),
            Way::Elsewhere(token_channel) => token_channel.accept(),
        }
    }

    /// Sends the next token of the prompt.
    pub fn prompt(&self, token: Token) -> SendOutcome {
        match &self.0 {
            Way::Here(token_channel) => token_channel.send(1, || Output::Prompt(token)),
            Way::Elsewhere(token_channel) => token_channel.prompt(token),
        }
    }

    /// Sends the next token.
    pub fn token(&self, token: Token) -> SendOutcome {
        match &self.0 {
            Way::Here(token_channel) => token_channel.send(1, || Output::Token(token)),
            Way::Elsewhere(token_channel) => token_channel.token(token),
        }
    }

    /// Sends the next tokens, which came together. Where there is no credit for all of them, some may be sent.
    pub(super) fn tokens(&self, mut tokens: impl ExactSizeIterator<Item = Token>) -> SendOutcome {
        match &self.0 {
            Way::Here(token_channel) => {
                token_channel.send(tokens.len(), || match (tokens.len(), tokens.next()) {
                    (1, Some(token)) => Output::Token(token),
                    (_, first) => Output::Tokens(first.into_iter().chain(tokens).collect()),
                })
            }
            Way::Elsewhere(token_channel) => tokens
                .find_map(|token| {
                    Some(token_channel.token(token)).filter(|sent| *sent != SendOutcome::Delivered)
                })
                .unwrap_or(SendOutcome::Delivered),
        }
    }

    /// Ends the token_channel well.
    pub fn finish(self, token: Option<Token>, reason: FinishReason) {
        match self.0 {
            Way::Here(token_channel) => {
                token_channel.end(Output::Finished(token, reason));
            }
            Way::Elsewhere(token_channel) => token_channel.finish(token, reason),
        }
    }

    /// Ends the token_channel with a failure.
    pub fn fail(self, failure: Failure) {
        match self.0 {
            Way::Here(token_channel) => {
                token_channel.end(Output::Failed(failure));
            }
            Way::Elsewhere(token_channel) => token_channel.fail(&failure),
        }
    }

    /// Closes the token_channel without an end, because its worker crashed. A token_channel that is just dropped says only that
    /// its worker is gone.
    pub(super) fn crash(self) {
        match self.0 {
            Way::Here(token_channel) => token_channel
                .shared
                .has_crashed
                .store(true, Ordering::SeqCst),
            // The worker says so for all its sequences.
            Way::Elsewhere(_) => {}
        }
    }

    /// Notes which worker is to be woken from now on.
    pub(super) fn placed(&self, worker: Wake) {
        match &self.0 {
            // A token_channel is placed once; were it placed twice, the first worker would have dropped it.
            Way::Here(token_channel) => drop(token_channel.shared.worker.set(worker)),
            Way::Elsewhere(_) => {}
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
        // Only the worker sends, so what is free now is still free when it does.
        let on_the_lane = self.sent.get() - self.shared.taken.load(Ordering::SeqCst);
        self.shared.credit - on_the_lane
    }

    /// Asks to be woken, and then looks again: a reader that has made credit in between has either seen
    /// the flag, or is seen here.
    fn stall(&self) -> usize {
        self.shared.stalled.store(true, Ordering::SeqCst);
        self.free()
    }

    /// Sends an output of so many tokens.
    fn send(&self, tokens: usize, output: impl FnOnce() -> Output) -> SendOutcome {
        if self.free() < tokens {
            return SendOutcome::NoRoom;
        }
        self.sent.set(self.sent.get() + tokens);
        match self.outputs.try_send(output()) {
            Ok(()) => SendOutcome::Delivered,
            Err(TrySendError::Closed(_)) => SendOutcome::Closed,
            Err(TrySendError::Full(_)) => SendOutcome::NoRoom,
        }
    }

    fn end(self, output: Output) {
        if let Output::Failed(Failure::SlowReader) = output
            && let Some(stream) = self.shared.stream.get()
        {
            stream.linger();
        }
        // A reader that has gone need not be told.
        let _ = self.outputs.try_send(output);
    }
}

impl Output {
    /// Its tokens of the completion.
    pub fn made(&self) -> &[Token] {
        match self {
            Self::Token(token) | Self::Finished(Some(token), _) => std::slice::from_ref(token),
            Self::Tokens(tokens) => tokens,
            Self::Accepted | Self::Prompt(_) | Self::Finished(None, _) | Self::Failed(_) => &[],
        }
    }

    /// How many tokens it takes of its token_channel's credit.
    fn tokens(&self) -> usize {
        match self {
            Self::Prompt(_) | Self::Token(_) => 1,
            Self::Tokens(tokens) => tokens.len(),
            Self::Accepted | Self::Finished(..) | Self::Failed(_) => 0,
        }
    }
}

/// The stream's end. Dropping it cancels the sequence at once, wherever it is.
pub struct TokenReceiver {
    receiver: mpsc::Receiver<Output>,
    shared: Arc<Shared>,
    wasted: Counter,
}

impl TokenReceiver {
    /// Receives what is there, up to `limit` outputs, or waits. Ready with 0 when the token_channel has
    /// closed.
    pub fn poll_recv_many(
        &mut self,
        cx: &mut Context<'_>,
        outputs: &mut Vec<Output>,
        limit: usize,
    ) -> Poll<usize> {
        let before = outputs.len();
        let received = self.receiver.poll_recv_many(cx, outputs, limit);
        if received.is_ready() {
            self.give_credit(outputs[before..].iter().map(Output::tokens).sum());
        }
        received
    }

    /// Has this stream counted as given up when the token_channel ends because its reader is too slow: such a reader
    /// may not come to read the end for long.
    pub fn set_stream_count(&self, stream: StreamCount) {
        // A token_channel has one stream for as long as it lives.
        let _ = self.shared.stream.set(stream);
    }

    /// Has the token_channel counted for the same stream as this one, which it inherit_stream_count.
    pub fn inherit_stream_count(&self, lost: &Self) {
        if let Some(stream) = lost.shared.stream.get() {
            self.set_stream_count(stream.clone());
        }
    }

    /// Whether the token_channel closed without an end because its worker crashed.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.shared.has_crashed.load(Ordering::SeqCst)
    }

    fn give_credit(&self, tokens: usize) {
        self.shared.taken.fetch_add(tokens, Ordering::SeqCst);
        if self.shared.stalled.swap(false, Ordering::SeqCst)
            && let Some(worker) = self.shared.worker.get()
        {
            worker.attend();
        }
    }
}

impl Drop for TokenReceiver {
    fn drop(&mut self) {
        self.receiver.close();
        while let Ok(output) = self.receiver.try_recv() {
            let wasted = u64::try_from(output.made().len()).unwrap_or(u64::MAX);
            self.wasted.increment(wasted);
        }
        match self.shared.worker.get() {
            Some(worker) => worker.attend(),
            None => self.shared.queue.notify_one(),
        }
    }
}

#[cfg(test)]
mod tests;
