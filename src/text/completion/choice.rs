//! One choice of a completion: what it has, where its tokens come from, and how it goes on when its worker is lost.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::CompletionEvent;
use crate::error::Error;
use crate::request::{FinishReason, TokenId};
use crate::runner::Token;
use crate::scheduler::{DeliveredToken, LossHistory, Resumer, WorkerLoss};
use crate::text::{IncrementalDetokenizer, StopStatus};
use crate::tokens::TokenBatch;
use crate::worker::token_channel::TokenReceiver;

/// One choice.
pub(super) struct Choice {
    pub(super) number: u32,
    /// Gone when the choice has ended.
    pub(super) token_channel: Option<TokenReceiver>,
    pub(super) text: IncrementalDetokenizer,
    next_index: u32,
    /// How many tokens it has, told or not.
    pub(super) made: u32,
    /// How many of the next tokens the client has already: they were held back, and are no more.
    already_delivered: usize,
    /// Whether it may go on elsewhere.
    is_resumable: bool,
    /// What it has, to go on behind it elsewhere.
    ids: Vec<TokenId>,
    lost: LossHistory,
    /// Whether the worker where it is has taken it.
    is_accepted: bool,
    /// Since when it waits for the next token of another worker, and until when for that worker.
    resuming: Option<(Instant, AcceptanceTimeout)>,
}

/// Ends when no other worker has taken a choice in time; pending once one has.
type AcceptanceTimeout = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

impl Choice {
    pub(super) fn new(
        number: u32,
        token_channel: TokenReceiver,
        text: IncrementalDetokenizer,
        is_resumable: bool,
    ) -> Self {
        Self {
            number,
            token_channel: Some(token_channel),
            text,
            next_index: 0,
            made: 0,
            already_delivered: 0,
            is_resumable,
            ids: Vec::new(),
            lost: LossHistory::default(),
            is_accepted: false,
            resuming: None,
        }
    }

    /// The choice as it goes on behind what its client has.
    pub(super) fn behind(mut self, held: Vec<DeliveredToken>) -> Result<Self, Error> {
        let count = held.len();
        self.ids = held.iter().map(|(id, _)| *id).collect();
        let tokens = held.into_iter().map(|(id, bytes)| Token {
            id,
            bytes,
            due_ns: 0,
            emitted_ns: 0,
            logprobs: None,
        });
        let told = self.text.replay(tokens).ok_or_else(|| {
            let message = "resume holds a stop string, with which that choice has ended.";
            Error::invalid_value("resume", message)
        })?;
        self.already_delivered = count - told;
        self.next_index = u32::try_from(count).unwrap_or(u32::MAX);
        self.made = self.next_index;
        Ok(self)
    }

    /// A worker has it, for the first time or again.
    pub(super) fn accepted(&mut self) {
        self.is_accepted = true;
        if let Some((_, acceptance_timeout)) = &mut self.resuming {
            *acceptance_timeout = None;
        }
    }

    /// Takes the tokens that were made, and appends those that may be told. Where one of them completes a stop string,
    /// the choice ends with those that were decided before it.
    pub(super) fn take(
        &mut self,
        made: impl IntoIterator<Item = Token>,
        ready: &mut TokenBatch,
    ) -> Option<(usize, FinishReason)> {
        for token in made {
            self.made += 1;
            if self.is_resumable {
                self.ids.push(token.id);
            }
            let decided = ready.len();
            if self.text.push(token, ready) == StopStatus::Matched {
                return Some((decided, FinishReason::Stop));
            }
        }
        None
    }

    /// It has got a token: how long it had waited for it where it goes on elsewhere.
    pub(super) fn record_progress(&mut self) -> Option<Duration> {
        let (since, _) = self.resuming.take()?;
        self.lost.record_progress();
        Some(since.elapsed())
    }

    /// Has it go on elsewhere, because its worker was lost.
    pub(super) fn resume(&mut self, resumer: &Resumer, scores_prompt: bool) -> Result<(), Error> {
        let by_crash = self
            .token_channel
            .as_ref()
            .is_some_and(TokenReceiver::has_crashed);
        let loss = match (by_crash, std::mem::take(&mut self.is_accepted)) {
            (true, _) => WorkerLoss::Crash,
            (false, true) => WorkerLoss::AfterAcceptance,
            (false, false) => WorkerLoss::BeforeAcceptance,
        };
        self.lost.again(loss, self.made);
        let resuming = resumer.resume(self.number, &self.ids, scores_prompt, &self.lost)?;
        let since = self.resuming.take().map(|(since, _)| since);
        self.resuming = Some((
            since.unwrap_or_else(Instant::now),
            Some(resuming.acceptance_timeout),
        ));
        if let Some(lost) = &self.token_channel {
            resuming.token_channel.inherit_stream_count(lost);
        }
        self.token_channel = Some(resuming.token_channel);
        Ok(())
    }

    /// Whether it has waited for another worker in vain.
    pub(super) fn acceptance_timed_out(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.resuming {
            Some((_, Some(acceptance_timeout))) => acceptance_timeout.as_mut().poll(cx).is_ready(),
            Some((_, None)) | None => false,
        }
    }

    /// An event of these tokens, if there is anything to tell.
    pub(super) fn event(
        &mut self,
        tokens: TokenBatch,
        finish: Option<FinishReason>,
    ) -> Option<CompletionEvent> {
        let again = self.already_delivered.min(tokens.len());
        self.already_delivered -= again;
        let tokens = tokens.skip_first(again);
        if tokens.is_empty() && finish.is_none() {
            return None;
        }
        let first_index = self.next_index;
        self.next_index += u32::try_from(tokens.len()).expect("a batch is small");
        Some(CompletionEvent::Tokens {
            choice: self.number,
            first_index,
            tokens,
            finish,
        })
    }
}
