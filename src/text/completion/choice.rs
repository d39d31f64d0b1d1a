//! One choice of a completion: its token channel, its text, and its resumption after its worker is lost.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::event::CompletionEvent;
use crate::error::Error;
use crate::prompt::DeliveredToken;
use crate::request::{FinishReason, TokenId};
use crate::runner::Token;
use crate::scheduler::{LossHistory, Resumer, WorkerLoss};
use crate::text::{IncrementalDetokenizer, StopStatus};
use crate::tokens::TokenBatch;
use crate::worker::token_channel::TokenReceiver;

/// One choice of a completion.
pub(super) struct Choice {
    pub(super) number: u32,
    /// `None` once the choice has ended.
    pub(super) token_channel: Option<TokenReceiver>,
    pub(super) detokenizer: IncrementalDetokenizer,
    /// Index of the next token to return to the client.
    next_index: u32,
    /// Number of tokens received so far. It includes tokens that stop strings hold back, and tokens that the client
    /// had before the request.
    pub(super) token_count: u32,
    /// Number of tokens to skip because the client already has them. They were held back when the choice was resumed.
    already_delivered: usize,
    /// True if the model supports resumption.
    is_resumable: bool,
    /// Ids of all tokens received so far, from which another worker can resume. Empty if the choice is not resumable.
    ids: Vec<TokenId>,
    losses: LossHistory,
    /// True if the current worker has accepted the choice.
    is_accepted: bool,
    /// The resumption in progress: the time of the loss, and the acceptance timeout. `None` after the first token
    /// from the new worker.
    resumption: Option<(Instant, AcceptanceTimeout)>,
}

/// Completes if no other worker accepts the choice in time. `None` after a worker has accepted it.
type AcceptanceTimeout = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

impl Choice {
    pub(super) fn new(
        number: u32,
        token_channel: TokenReceiver,
        detokenizer: IncrementalDetokenizer,
        is_resumable: bool,
    ) -> Self {
        Self {
            number,
            token_channel: Some(token_channel),
            detokenizer,
            next_index: 0,
            token_count: 0,
            already_delivered: 0,
            is_resumable,
            ids: Vec::new(),
            losses: LossHistory::default(),
            is_accepted: false,
            resumption: None,
        }
    }

    /// Makes the choice continue after the tokens that the client already has.
    pub(super) fn resumed_after(mut self, delivered: Vec<DeliveredToken>) -> Result<Self, Error> {
        let count = delivered.len();
        self.ids = delivered.iter().map(|token| token.id).collect();
        let tokens = delivered
            .into_iter()
            .map(|DeliveredToken { id, bytes }| Token {
                id,
                bytes,
                due_ns: 0,
                emitted_ns: 0,
                logprobs: None,
            });
        let released = self.detokenizer.replay(tokens).ok_or_else(|| {
            let message = "`resume` contains a stop string: that choice has already ended.";
            Error::invalid_value("resume", message)
        })?;
        self.already_delivered = count - released;
        self.next_index = u32::try_from(count).unwrap_or(u32::MAX);
        self.token_count = self.next_index;
        Ok(self)
    }

    /// Records that a worker has accepted the choice.
    pub(super) fn record_acceptance(&mut self) {
        self.is_accepted = true;
        if let Some((_, acceptance_timeout)) = &mut self.resumption {
            *acceptance_timeout = None;
        }
    }

    /// Decodes received tokens and appends to `ready` those that can be returned.
    ///
    /// If a stop string matches, returns the number of tokens in `ready` before the token that completed the match,
    /// and the finish reason.
    pub(super) fn decode(
        &mut self,
        received: impl IntoIterator<Item = Token>,
        ready: &mut TokenBatch,
    ) -> Option<(usize, FinishReason)> {
        for token in received {
            self.token_count += 1;
            if self.is_resumable {
                self.ids.push(token.id);
            }
            let decided = ready.len();
            if self.detokenizer.push(token, ready) == StopStatus::Matched {
                return Some((decided, FinishReason::Stop));
            }
        }
        None
    }

    /// Records the arrival of a token. After a resumption, returns the time between the loss of the worker and this
    /// token.
    pub(super) fn record_progress(&mut self) -> Option<Duration> {
        let (since, _) = self.resumption.take()?;
        self.losses.record_progress();
        Some(since.elapsed())
    }

    /// Starts to resume the choice on another worker, after its worker was lost.
    pub(super) fn resume(&mut self, resumer: &Resumer, scores_prompt: bool) -> Result<(), Error> {
        let has_crashed = self
            .token_channel
            .as_ref()
            .is_some_and(TokenReceiver::has_crashed);
        let loss = match (has_crashed, std::mem::take(&mut self.is_accepted)) {
            (true, _) => WorkerLoss::Crash,
            (false, true) => WorkerLoss::AfterAcceptance,
            (false, false) => WorkerLoss::BeforeAcceptance,
        };
        self.losses.record_loss(loss, self.token_count);
        let pending = resumer.resume(self.number, &self.ids, scores_prompt, &self.losses)?;
        let since = self.resumption.take().map(|(since, _)| since);
        self.resumption = Some((
            since.unwrap_or_else(Instant::now),
            Some(pending.acceptance_timeout),
        ));
        if let Some(previous) = &self.token_channel {
            pending.token_channel.inherit_request_gauge(previous);
        }
        self.token_channel = Some(pending.token_channel);
        Ok(())
    }

    /// Returns true if no other worker accepted the choice in time.
    pub(super) fn acceptance_timed_out(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.resumption {
            Some((_, Some(acceptance_timeout))) => acceptance_timeout.as_mut().poll(cx).is_ready(),
            Some((_, None)) | None => false,
        }
    }

    /// Creates the event for these tokens. Returns `None` if the event would have neither tokens nor a finish reason.
    pub(super) fn event(
        &mut self,
        tokens: TokenBatch,
        finish: Option<FinishReason>,
    ) -> Option<CompletionEvent> {
        let skipped = self.already_delivered.min(tokens.len());
        self.already_delivered -= skipped;
        let tokens = tokens.skip_first(skipped);
        if tokens.is_empty() && finish.is_none() {
            return None;
        }
        let first_index = self.next_index;
        self.next_index +=
            u32::try_from(tokens.len()).expect("a batch has at most a few thousand tokens");
        Some(CompletionEvent::Tokens {
            choice: self.number,
            first_index,
            tokens,
            finish,
        })
    }
}
