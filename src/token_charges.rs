//! Charges the tokens of one completion to the budgets of its key, and ends the completion at the token that uses up a
//! budget. This module must not know how a completion is delivered.

use crate::error::Error;
use crate::keys::{Reservation, TokenCount};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;

/// Charges the events of one completion, in order.
pub(crate) struct TokenCharges {
    /// `None` after the completion has ended.
    reservation: Option<Reservation>,
    charged: TokenCount,
    /// True if the engine reports only text. A part of a chat message then counts as one token until the engine
    /// reports the usage.
    is_text_only: bool,
    /// Error that follows the last event.
    used_up: Option<Error>,
}

impl TokenCharges {
    pub(crate) fn new(reservation: Reservation) -> Self {
        Self {
            reservation: Some(reservation),
            charged: TokenCount::default(),
            is_text_only: false,
            used_up: None,
        }
    }

    /// Returns the error that ends the completion, if the last event has used up a budget. Call this before each event.
    pub(crate) fn take_error(&mut self) -> Option<Error> {
        self.used_up.take()
    }

    /// Charges an event. Removes the tokens that the budgets do not allow.
    ///
    /// # Errors
    /// A budget was used up before this event. The completion ends without the event.
    pub(crate) fn charge(&mut self, event: &mut Event) -> Result<(), Error> {
        let Some(reservation) = &mut self.reservation else {
            return Ok(());
        };
        match event {
            Event::Started(started) => {
                self.is_text_only = started.text_only;
                reservation.charge_prompt(started.prompt_tokens.into());
                self.charged.prompt += u64::from(started.prompt_tokens);
                reservation.check_left()
            }
            Event::Prompt(_) => Ok(()),
            Event::Chat(_) if self.is_text_only => match self.charge_tokens(1) {
                0 => Err(self.end()),
                _ => {
                    self.check_next(false);
                    Ok(())
                }
            },
            Event::Chat(_) => Ok(()),
            Event::Tokens(tokens) => self.charge_tokens_event(tokens),
            Event::Summary(summary) => {
                let usage = summary.usage.unwrap_or_default();
                self.settle(usage);
                Ok(())
            }
        }
    }

    fn charge_tokens_event(&mut self, tokens: &mut v1::Tokens) -> Result<(), Error> {
        let count = tokens.tokens.len();
        if count == 0 {
            return Ok(());
        }
        let granted = self.charge_tokens(u64::try_from(count).unwrap_or(u64::MAX));
        let granted = usize::try_from(granted).unwrap_or(usize::MAX);
        if granted == 0 {
            return Err(self.end());
        }
        let is_cut = granted < count;
        if is_cut {
            tokens.tokens.truncate(granted);
            tokens.finish_reason = v1::FinishReason::Unspecified.into();
        }
        let has_finished = tokens.finish_reason() != v1::FinishReason::Unspecified;
        if !has_finished {
            self.check_next(is_cut);
        }
        Ok(())
    }

    /// Charges tokens of the completion. Returns how many of them the budgets allow.
    fn charge_tokens(&mut self, tokens: u64) -> u64 {
        let Some(reservation) = &mut self.reservation else {
            return tokens;
        };
        let granted = reservation.charge_completion(tokens);
        self.charged.completion += granted;
        granted
    }

    /// Checks that the completion may have another token. If not, the error follows the present event.
    fn check_next(&mut self, is_cut: bool) {
        let Some(reservation) = &mut self.reservation else {
            return;
        };
        if is_cut || reservation.check_left().is_err() {
            self.used_up = Some(self.end());
        }
    }

    /// Ends the completion because of a budget. Gives back what is reserved.
    fn end(&mut self) -> Error {
        let reservation = self.reservation.take();
        reservation.map_or_else(Error::internal, |reservation| reservation.used_up())
    }

    /// Settles a completion that has ended. An engine that reports only text counts its tokens in the usage, and one
    /// that is not Tokenway may report there how many tokens the prompt has.
    fn settle(&mut self, usage: v1::Usage) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let prompt = u64::from(usage.prompt_tokens).saturating_sub(self.charged.prompt);
        let completion = match self.is_text_only {
            true => u64::from(usage.completion_tokens).saturating_sub(self.charged.completion),
            false => 0,
        };
        reservation.charge_unreserved(TokenCount { prompt, completion });
    }
}
