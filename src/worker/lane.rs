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
use super::outbox::RemoteLane;
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

/// A lane on which the sequence can run `credit` tokens ahead of its reader.
///
/// `queue` is notified when the reader goes away before a worker has the sequence; `wasted` counts
/// the tokens that nobody read.
///
/// # Panics
/// When `credit` is 0.
#[must_use]
pub fn lane(credit: usize, queue: Arc<Notify>, wasted: Counter) -> (LaneSender, LaneReceiver) {
    assert!(credit > 0, "a lane without credit could never move");
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
    let sender = LaneSender(Way::Here(LocalLane {
        outputs,
        sent: Cell::new(0),
        shared: Arc::clone(&shared),
    }));
    (
        sender,
        LaneReceiver {
            receiver,
            shared,
            wasted,
        },
    )
}

struct Shared {
    /// How many tokens may be on the lane.
    credit: usize,
    /// How many the reader has taken.
    taken: AtomicUsize,
    /// Whether the worker passes the sequence over until there is room again.
    stalled: AtomicBool,
    /// Whether the lane closed without an end because its worker crashed, rather than that it was killed or
    /// could not be reached any more.
    has_crashed: AtomicBool,
    /// The worker that has the sequence.
    worker: OnceLock<Wake>,
    queue: Arc<Notify>,
    /// The stream that reads the lane, as the metrics count it.
    stream: OnceLock<StreamCount>,
}

/// The worker's end.
pub struct LaneSender(Way);

/// Where a lane leads.
enum Way {
    /// To a stream of this process.
    Here(LocalLane),
    /// To an engine elsewhere.
    Elsewhere(RemoteLane),
}

struct LocalLane {
    outputs: mpsc::Sender<Output>,
    /// How many tokens were sent.
    sent: Cell<usize>,
    shared: Arc<Shared>,
}

/// What became of a token that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Its reader will have it.
    Delivered,
    /// The reader is gone.
    Closed,
    /// There was no room for it.
    NoRoom,
}

impl LaneSender {
    /// A lane to an engine elsewhere.
    pub(super) fn elsewhere(lane: RemoteLane) -> Self {
        Self(Way::Elsewhere(lane))
    }

    /// Whether the reader is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match &self.0 {
            Way::Here(lane) => lane.outputs.is_closed(),
            Way::Elsewhere(lane) => lane.is_cancelled(),
        }
    }

    /// How many more tokens the reader has room for. At 0, the worker is woken when that changes.
    #[must_use]
    pub fn room(&self) -> usize {
        match &self.0 {
            Way::Here(lane) => lane.room(),
            Way::Elsewhere(lane) => lane.credit(),
        }
    }

    /// Says that a worker has the sequence now.
    pub fn accept(&self) -> Sent {
        match &self.0 {
            Way::Here(lane) => lane.send(0, || Output::Accepted),
            Way::Elsewhere(lane) => lane.accept(),
        }
    }

    /// Sends the next token of the prompt.
    pub fn prompt(&self, token: Token) -> Sent {
        match &self.0 {
            Way::Here(lane) => lane.send(1, || Output::Prompt(token)),
            Way::Elsewhere(lane) => lane.prompt(token),
        }
    }

    /// Sends the next token.
    pub fn token(&self, token: Token) -> Sent {
        match &self.0 {
            Way::Here(lane) => lane.send(1, || Output::Token(token)),
            Way::Elsewhere(lane) => lane.token(token),
        }
    }

    /// Sends the next tokens, which came together. Where there is no room for all of them, some may be sent.
    pub(super) fn tokens(&self, mut tokens: impl ExactSizeIterator<Item = Token>) -> Sent {
        match &self.0 {
            Way::Here(lane) => lane.send(tokens.len(), || match (tokens.len(), tokens.next()) {
                (1, Some(token)) => Output::Token(token),
                (_, first) => Output::Tokens(first.into_iter().chain(tokens).collect()),
            }),
            Way::Elsewhere(lane) => tokens
                .find_map(|token| Some(lane.token(token)).filter(|sent| *sent != Sent::Delivered))
                .unwrap_or(Sent::Delivered),
        }
    }

    /// Ends the lane well.
    pub fn finish(self, token: Option<Token>, reason: FinishReason) {
        match self.0 {
            Way::Here(lane) => {
                lane.end(Output::Finished(token, reason));
            }
            Way::Elsewhere(lane) => lane.finish(token, reason),
        }
    }

    /// Ends the lane with a failure.
    pub fn fail(self, failure: Failure) {
        match self.0 {
            Way::Here(lane) => {
                lane.end(Output::Failed(failure));
            }
            Way::Elsewhere(lane) => lane.fail(&failure),
        }
    }

    /// Closes the lane without an end, because its worker crashed. A lane that is just dropped says only that
    /// its worker is gone.
    pub(super) fn crash(self) {
        match self.0 {
            Way::Here(lane) => lane.shared.has_crashed.store(true, Ordering::SeqCst),
            // The worker says so for all its sequences.
            Way::Elsewhere(_) => {}
        }
    }

    /// Notes which worker is to be woken from now on.
    pub(super) fn placed(&self, worker: Wake) {
        match &self.0 {
            // A lane is placed once; were it placed twice, the first worker would have dropped it.
            Way::Here(lane) => drop(lane.shared.worker.set(worker)),
            Way::Elsewhere(_) => {}
        }
    }
}

impl LocalLane {
    fn room(&self) -> usize {
        match self.free() {
            0 => self.stall(),
            room => room,
        }
    }

    fn free(&self) -> usize {
        // Only the worker sends, so what is free now is still free when it does.
        let on_the_lane = self.sent.get() - self.shared.taken.load(Ordering::SeqCst);
        self.shared.credit - on_the_lane
    }

    /// Asks to be woken, and then looks again: a reader that has made room in between has either seen
    /// the flag, or is seen here.
    fn stall(&self) -> usize {
        self.shared.stalled.store(true, Ordering::SeqCst);
        self.free()
    }

    /// Sends an output of so many tokens.
    fn send(&self, tokens: usize, output: impl FnOnce() -> Output) -> Sent {
        if self.free() < tokens {
            return Sent::NoRoom;
        }
        self.sent.set(self.sent.get() + tokens);
        match self.outputs.try_send(output()) {
            Ok(()) => Sent::Delivered,
            Err(TrySendError::Closed(_)) => Sent::Closed,
            Err(TrySendError::Full(_)) => Sent::NoRoom,
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

    /// How many tokens it takes of its lane's credit.
    fn tokens(&self) -> usize {
        match self {
            Self::Prompt(_) | Self::Token(_) => 1,
            Self::Tokens(tokens) => tokens.len(),
            Self::Accepted | Self::Finished(..) | Self::Failed(_) => 0,
        }
    }
}

/// The stream's end. Dropping it cancels the sequence at once, wherever it is.
pub struct LaneReceiver {
    receiver: mpsc::Receiver<Output>,
    shared: Arc<Shared>,
    wasted: Counter,
}

impl LaneReceiver {
    /// Receives what is there, up to `limit` outputs, or waits. Ready with 0 when the lane has
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

    /// Has this stream counted as given up when the lane ends because its reader is too slow: such a reader
    /// may not come to read the end for long.
    pub fn count_for(&self, stream: StreamCount) {
        // A lane has one stream for as long as it lives.
        let _ = self.shared.stream.set(stream);
    }

    /// Has the lane counted for the same stream as this one, which it replaces.
    pub fn replaces(&self, lost: &Self) {
        if let Some(stream) = lost.shared.stream.get() {
            self.count_for(stream.clone());
        }
    }

    /// Whether the lane closed without an end because its worker crashed.
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

impl Drop for LaneReceiver {
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
