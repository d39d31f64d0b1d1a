//! The outbox of a worker process: messages and tokens to be sent to the engine. All tokens of a step are sent as one
//! message.
//!
//! The device thread fills the outbox, and the connection to the engine empties it. The credit of the worker's
//! sequences bounds its size.

use std::cell::Cell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio_stream::Stream;

use super::sequence_output::{Failure, SendOutcome};
use super::tasks::Tasks;
use super::wire;
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message;
use crate::request::FinishReason;
use crate::runner::Token;

/// Initial capacity of a step's entry, in tokens. A device rarely produces more tokens for one sequence at once.
const TOKENS_PER_ENTRY: usize = 8;

/// Size in bytes at which a step message is closed. Later tokens go into the next message. Without this limit, log
/// probabilities could exceed the message limit while the engine does not read.
const STEP_BYTES: usize = 1024 * 1024;

/// Messages that wait to be sent to one engine.
#[derive(Default)]
pub(super) struct Outbox {
    pending: Mutex<PendingMessages>,
    /// Wakes the task that sends the messages.
    sender: AtomicWaker,
}

/// Unsent messages. They are sent in the order of the fields `messages`, `step`, `heartbeat`.
#[derive(Default)]
struct PendingMessages {
    messages: VecDeque<Message>,
    /// The step message to which tokens are still added.
    step: proto::Step,
    /// Approximate size of `step`, in bytes.
    step_bytes: usize,
    /// Number of step messages closed so far, so that it identifies the message in `step`. A token channel remembers
    /// the number under which it added its last entry. If the two are equal, that entry is still in `step`.
    step_number: u64,
    /// The latest heartbeat, if it is unsent.
    heartbeat: Option<proto::Heartbeat>,
}

impl PendingMessages {
    /// Reserves `bytes` for a token. Starts a new step message if the current one is already large enough.
    fn reserve(&mut self, bytes: usize) {
        if self.step_bytes >= STEP_BYTES {
            self.close_step();
        }
        self.step_bytes += bytes;
    }

    fn close_step(&mut self) {
        if !self.step.sequences.is_empty() {
            let step = std::mem::take(&mut self.step);
            self.step_bytes = 0;
            self.messages.push_back(Message::Step(step));
            self.step_number += 1;
        }
    }
}

impl Outbox {
    /// Queues a message after everything queued so far.
    pub(super) fn send(&self, message: Message) {
        let mut pending = self.pending();
        pending.close_step();
        pending.messages.push_back(message);
        drop(pending);
        self.sender.wake();
    }

    /// Queues a heartbeat. It replaces an earlier unsent heartbeat.
    pub(super) fn set_heartbeat(&self, heartbeat: proto::Heartbeat) {
        self.pending().heartbeat = Some(heartbeat);
        self.sender.wake();
    }

    fn has_tokens_or_messages(&self) -> bool {
        let pending = self.pending();
        !pending.messages.is_empty() || !pending.step.sequences.is_empty()
    }

    /// Moves all unsent messages into `messages`, which must be empty.
    fn take_messages(&self, messages: &mut VecDeque<Message>) {
        let mut pending = self.pending();
        pending.close_step();
        std::mem::swap(messages, &mut pending.messages);
        messages.extend(pending.heartbeat.take().map(Message::Heartbeat));
    }

    fn pending(&self) -> MutexGuard<'_, PendingMessages> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stream of an outbox's messages, in the form that tonic sends.
pub(super) struct OutboundMessages {
    outbox: Arc<Outbox>,
    messages: VecDeque<Message>,
}

impl OutboundMessages {
    pub(super) fn new(outbox: &Arc<Outbox>) -> Self {
        Self {
            outbox: Arc::clone(outbox),
            messages: VecDeque::new(),
        }
    }
}

impl Stream for OutboundMessages {
    type Item = proto::AttachRequest;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.messages.is_empty() {
            this.outbox.sender.register(cx.waker());
            this.outbox.take_messages(&mut this.messages);
        }
        match this.messages.pop_front() {
            None => Poll::Pending,
            message => Poll::Ready(Some(proto::AttachRequest { message })),
        }
    }
}

/// Sends the outbox of the current connection, if there is one. The device thread calls it after each step.
#[derive(Clone, Default)]
pub(super) struct StepNotifier(Arc<Mutex<Option<Connection>>>);

struct Connection {
    outbox: Arc<Outbox>,
    /// The tasks that send the outbox's messages.
    tasks: Tasks,
}

impl StepNotifier {
    pub(super) fn notify(&self) {
        if let Some(Connection { outbox, tasks }) = &*self.connection()
            && outbox.has_tokens_or_messages()
        {
            tasks.wake_and_poll(|| outbox.sender.wake());
        }
    }

    /// Sets the current connection: its outbox, and the tasks that send the outbox's messages.
    pub(super) fn connect(&self, outbox: &Arc<Outbox>, tasks: &Tasks) {
        *self.connection() = Some(Connection {
            outbox: Arc::clone(outbox),
            tasks: tasks.clone(),
        });
    }

    /// Clears the current connection.
    pub(super) fn disconnect(&self) {
        *self.connection() = None;
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's reader of one sequence, as the worker process sees it: its credit, and whether it has cancelled the
/// sequence.
pub(super) struct RemoteReader {
    credit: AtomicUsize,
    is_cancelled: AtomicBool,
}

impl RemoteReader {
    pub(super) fn new(credit: usize) -> Arc<Self> {
        Arc::new(Self {
            credit: AtomicUsize::new(credit),
            is_cancelled: AtomicBool::new(false),
        })
    }

    pub(super) fn grant(&self, tokens: usize) {
        self.credit.fetch_add(tokens, Ordering::SeqCst);
    }

    pub(super) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::SeqCst);
    }

    /// Returns true if the device thread has dropped the sequence's channel.
    pub(super) fn has_ended(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1
    }
}

/// The token channel of one sequence to an engine in another process. Only the device thread uses it. The engine
/// grants its credit.
pub(super) struct RemoteChannel {
    sequence: u64,
    reader: Arc<RemoteReader>,
    outbox: Arc<Outbox>,
    /// True if the engine asked for the times at which tokens were due and emitted.
    timestamps: bool,
    /// Index of the next completion token, and of the next prompt token.
    next_index: Cell<u32>,
    next_prompt_index: Cell<u32>,
    /// Position of this sequence's latest entry: number of the step message, and index of the entry in it.
    entry: Cell<Option<(u64, usize)>>,
}

impl RemoteChannel {
    /// Creates the channel of a sequence. `delivered` is the number of completion tokens that the client already has.
    pub(super) fn new(
        sequence: u64,
        reader: Arc<RemoteReader>,
        outbox: Arc<Outbox>,
        delivered: usize,
        timestamps: bool,
    ) -> Self {
        Self {
            sequence,
            reader,
            outbox,
            timestamps,
            next_index: Cell::new(u32::try_from(delivered).unwrap_or(u32::MAX)),
            next_prompt_index: Cell::new(0),
            entry: Cell::new(None),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.reader.is_cancelled.load(Ordering::SeqCst)
    }

    pub(super) fn credit(&self) -> usize {
        self.reader.credit.load(Ordering::SeqCst)
    }

    pub(super) fn accept(&self, cached_tokens: u32) -> SendOutcome {
        if self.is_cancelled() {
            return SendOutcome::Closed;
        }
        let accepted = proto::Accepted {
            sequence: self.sequence,
            cached_tokens,
        };
        // The message is sent before the step that is still open. That step has no tokens of this sequence yet.
        let mut pending = self.outbox.pending();
        pending.messages.push_back(Message::Accepted(accepted));
        SendOutcome::Delivered
    }

    pub(super) fn send_prompt_token(&self, token: Token) -> SendOutcome {
        self.send(token, true, proto::End::Unspecified)
    }

    pub(super) fn send_token(&self, token: Token) -> SendOutcome {
        self.send(token, false, proto::End::Unspecified)
    }

    pub(super) fn finish(&self, token: Option<Token>, reason: FinishReason) {
        let end = match reason {
            FinishReason::Stop => proto::End::Stop,
            FinishReason::Length => proto::End::Length,
        };
        match token {
            // The token and the end must be in the same entry, because the connection may send the pending messages
            // at any moment. The token has credit, unless the sequence was cancelled.
            Some(token) => drop(self.send(token, false, end)),
            None => self.entry(&mut self.outbox.pending(), false).end = end.into(),
        }
    }

    pub(super) fn fail(&self, failure: &Failure) {
        let mut pending = self.outbox.pending();
        let entry = self.entry(&mut pending, false);
        entry.end = proto::End::Failed.into();
        entry.failure = Some(wire::failure_message(failure));
    }

    fn send(&self, token: Token, is_prompt: bool, end: proto::End) -> SendOutcome {
        if self.is_cancelled() {
            return SendOutcome::Closed;
        }
        // Only this thread uses up credit, so the credit cannot shrink between this check and the subtraction.
        if self.credit() == 0 {
            return SendOutcome::NoCredit;
        }
        self.reader.credit.fetch_sub(1, Ordering::SeqCst);
        let mut pending = self.outbox.pending();
        pending.reserve(wire::token_size(&token));
        let entry = self.entry(&mut pending, is_prompt);
        wire::push_token(entry, token, self.timestamps);
        entry.end = end.into();
        drop(pending);
        let next = self.next(is_prompt);
        next.set(next.get() + 1);
        SendOutcome::Delivered
    }

    fn next(&self, is_prompt: bool) -> &Cell<u32> {
        if is_prompt {
            &self.next_prompt_index
        } else {
            &self.next_index
        }
    }

    /// Creates an empty entry for this sequence.
    fn new_entry(&self, is_prompt: bool) -> proto::SequenceStep {
        let times = if self.timestamps { TOKENS_PER_ENTRY } else { 0 };
        proto::SequenceStep {
            sequence: self.sequence,
            first_index: self.next(is_prompt).get(),
            is_prompt,
            ids: proto::PackedVarints::with_capacity(TOKENS_PER_ENTRY * size_of::<u32>()),
            lengths: proto::PackedVarints::with_capacity(TOKENS_PER_ENTRY),
            bytes: Vec::with_capacity(TOKENS_PER_ENTRY * size_of::<u64>()),
            due_ns: Vec::with_capacity(times),
            emitted_ns: Vec::with_capacity(times),
            ..proto::SequenceStep::default()
        }
    }

    /// Returns the sequence's entry in the open step message, for prompt or completion tokens. Adds an entry if there
    /// is none.
    fn entry<'a>(
        &self,
        pending: &'a mut PendingMessages,
        is_prompt: bool,
    ) -> &'a mut proto::SequenceStep {
        let number = pending.step_number;
        let sequences = &mut pending.step.sequences;
        let known = self.entry.get().filter(|(step, _)| *step == number);
        let at = match known {
            Some((_, at)) if sequences[at].is_prompt == is_prompt => at,
            Some(_) | None => {
                sequences.push(self.new_entry(is_prompt));
                sequences.len() - 1
            }
        };
        self.entry.set(Some((number, at)));
        &mut sequences[at]
    }
}

#[cfg(test)]
mod tests;
