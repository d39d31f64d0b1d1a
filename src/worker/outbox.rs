//! The lanes of sequences whose engine is elsewhere: what a step makes is gathered, and leaves as one
//! message. A token_channel's room is the credit that the engine has given.
//!
//! The device's thread fills it and the worker's connection empties it. What it holds is bounded by the
//! credit of the worker's sequences.

use std::cell::Cell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio_stream::Stream;

use super::tasks::Tasks;
use super::token_channel::{Failure, SendOutcome};
use super::wire;
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message;
use crate::request::FinishReason;
use crate::runner::Token;

/// What an entry of a step has room for at first, in tokens: a device makes few of a sequence at once.
const TOKENS: usize = 8;

/// Once a step is about so large, in bytes, what is more is the next one's. With an engine that does not read for a
/// while, and log probabilities, one step of all would be larger than a message may be.
const STEP: usize = 1024 * 1024;

/// What is on its way to one engine, by one connection.
#[derive(Default)]
pub(super) struct Outbox {
    gathered: Mutex<PendingMessages>,
    /// Woken when there is something to send.
    sender: AtomicWaker,
}

/// Messages leave in this order.
#[derive(Default)]
struct PendingMessages {
    messages: VecDeque<Message>,
    /// What a step makes of which not all is told yet.
    step: proto::Step,
    /// How large it is, about, in bytes.
    step_bytes: usize,
    /// Counts the steps, so that a token_channel knows whether its entry is in this one.
    number: u64,
    /// The last heartbeat, where it has not left.
    heartbeat: Option<proto::Heartbeat>,
}

impl PendingMessages {
    /// Has a token of so many bytes be part of a step that is not too large.
    fn make_room(&mut self, bytes: usize) {
        if self.step_bytes >= STEP {
            self.end_step();
        }
        self.step_bytes += bytes;
    }

    fn end_step(&mut self) {
        if !self.step.sequences.is_empty() {
            let step = std::mem::take(&mut self.step);
            self.step_bytes = 0;
            self.messages.push_back(Message::Step(step));
            self.number += 1;
        }
    }
}

impl Outbox {
    /// Says this behind all that was said before.
    pub(super) fn say(&self, message: Message) {
        let mut gathered = self.gathered();
        gathered.end_step();
        gathered.messages.push_back(message);
        drop(gathered);
        self.sender.wake();
    }

    /// Says that the worker lives; of several that have not left the last one counts.
    pub(super) fn beat(&self, heartbeat: proto::Heartbeat) {
        self.gathered().heartbeat = Some(heartbeat);
        self.sender.wake();
    }

    fn has_something(&self) -> bool {
        let gathered = self.gathered();
        !gathered.messages.is_empty() || !gathered.step.sequences.is_empty()
    }

    /// What there is to send, in exchange for an empty list.
    fn take(&self, messages: &mut VecDeque<Message>) {
        let mut gathered = self.gathered();
        gathered.end_step();
        std::mem::swap(messages, &mut gathered.messages);
        messages.extend(gathered.heartbeat.take().map(Message::Heartbeat));
    }

    /// Held for a push or a take.
    fn gathered(&self) -> MutexGuard<'_, PendingMessages> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that is said by an outbox, as it is sent.
pub(super) struct OutboundMessages {
    outbox: Arc<Outbox>,
    messages: VecDeque<Message>,
}

impl OutboundMessages {
    pub(super) fn of(outbox: &Arc<Outbox>) -> Self {
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
            this.outbox.take(&mut this.messages);
        }
        match this.messages.pop_front() {
            None => Poll::Pending,
            message => Poll::Ready(Some(proto::AttachRequest { message })),
        }
    }
}

/// Rung by a device's thread after each step: what was gathered leaves by the connection that there is.
#[derive(Clone, Default)]
pub(super) struct StepNotifier(Arc<Mutex<Option<Connection>>>);

struct Connection {
    outbox: Arc<Outbox>,
    /// What sends it.
    tasks: Tasks,
}

impl StepNotifier {
    pub(super) fn ring(&self) {
        if let Some(Connection { outbox, tasks }) = &*self.connection()
            && outbox.has_something()
        {
            tasks.wake_here(|| outbox.sender.wake());
        }
    }

    /// Has it ring for this outbox, which these tasks send, and for no other.
    pub(super) fn ring_for(&self, outbox: &Arc<Outbox>, tasks: &Tasks) {
        *self.connection() = Some(Connection {
            outbox: Arc::clone(outbox),
            tasks: tasks.clone(),
        });
    }

    /// The connection is gone.
    pub(super) fn ring_for_nobody(&self) {
        *self.connection() = None;
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the connection knows of a sequence.
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

    /// Whether the device has dropped the sequence's token_channel.
    pub(super) fn has_ended(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1
    }
}

/// One sequence's token_channel to an engine elsewhere. It stays on its device's thread.
pub(super) struct RemoteChannel {
    sequence: u64,
    reader: Arc<RemoteReader>,
    outbox: Arc<Outbox>,
    /// Whether the engine wants to know when tokens were due and emitted.
    timestamps: bool,
    /// The index of the next token of the completion, and of the prompt.
    next_index: Cell<u32>,
    next_of_prompt: Cell<u32>,
    /// Where the entry of the last token is, and in which message.
    entry: Cell<Option<(u64, usize)>>,
}

impl RemoteChannel {
    /// The token_channel of this sequence, of which so many tokens are delivered.
    pub(super) fn new(
        (sequence, reader): (u64, Arc<RemoteReader>),
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
            next_of_prompt: Cell::new(0),
            entry: Cell::new(None),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.reader.is_cancelled.load(Ordering::SeqCst)
    }

    pub(super) fn credit(&self) -> usize {
        self.reader.credit.load(Ordering::SeqCst)
    }

    pub(super) fn accept(&self) -> SendOutcome {
        if self.is_cancelled() {
            return SendOutcome::Closed;
        }
        let accepted = proto::Accepted {
            sequence: self.sequence,
        };
        // Before the step that goes on being gathered: nothing of this sequence is in it.
        let mut gathered = self.outbox.gathered();
        gathered.messages.push_back(Message::Accepted(accepted));
        SendOutcome::Delivered
    }

    pub(super) fn prompt(&self, token: Token) -> SendOutcome {
        self.send(token, true, proto::End::Unspecified)
    }

    pub(super) fn token(&self, token: Token) -> SendOutcome {
        self.send(token, false, proto::End::Unspecified)
    }

    pub(super) fn finish(&self, token: Option<Token>, reason: FinishReason) {
        let end = match reason {
            FinishReason::Stop => proto::End::Stop,
            FinishReason::Length => proto::End::Length,
        };
        match token {
            // With it in one entry: the connection may take what is gathered at any moment. There is room for it, or
            // nobody waits for it.
            Some(token) => drop(self.send(token, false, end)),
            None => self.entry(&mut self.outbox.gathered(), false).end = end.into(),
        }
    }

    pub(super) fn fail(&self, failure: &Failure) {
        let mut gathered = self.outbox.gathered();
        let entry = self.entry(&mut gathered, false);
        entry.end = proto::End::Failed.into();
        entry.failure = Some(wire::failure(failure));
    }

    fn send(&self, token: Token, is_prompt: bool, end: proto::End) -> SendOutcome {
        if self.is_cancelled() {
            return SendOutcome::Closed;
        }
        // Only this thread takes credit, so what is seen here is still there.
        if self.credit() == 0 {
            return SendOutcome::NoRoom;
        }
        self.reader.credit.fetch_sub(1, Ordering::SeqCst);
        let mut gathered = self.outbox.gathered();
        gathered.make_room(wire::size(&token));
        let entry = self.entry(&mut gathered, is_prompt);
        wire::push(entry, token, self.timestamps);
        entry.end = end.into();
        drop(gathered);
        let next = self.next(is_prompt);
        next.set(next.get() + 1);
        SendOutcome::Delivered
    }

    fn next(&self, is_prompt: bool) -> &Cell<u32> {
        if is_prompt {
            &self.next_of_prompt
        } else {
            &self.next_index
        }
    }

    /// What a step makes of the sequence; nothing yet.
    fn new_entry(&self, is_prompt: bool) -> proto::SequenceStep {
        let times = if self.timestamps { TOKENS } else { 0 };
        proto::SequenceStep {
            sequence: self.sequence,
            first_index: self.next(is_prompt).get(),
            is_prompt,
            ids: proto::PackedVarints::with_capacity(TOKENS * size_of::<u32>()),
            lengths: proto::PackedVarints::with_capacity(TOKENS),
            bytes: Vec::with_capacity(TOKENS * size_of::<u64>()),
            due_ns: Vec::with_capacity(times),
            emitted_ns: Vec::with_capacity(times),
            ..proto::SequenceStep::default()
        }
    }

    /// The sequence's entry in what is gathered; a new one where it has none of this kind.
    fn entry<'a>(
        &self,
        gathered: &'a mut PendingMessages,
        is_prompt: bool,
    ) -> &'a mut proto::SequenceStep {
        let number = gathered.number;
        let sequences = &mut gathered.step.sequences;
        let known = self.entry.get().filter(|(of, _)| *of == number);
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
