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
    /// Number of tokens that the client had before the request. They are computed again, so they count like the prompt.
    resumed: u64,
    has_started: bool,
    /// True if the engine reports only text. Each part of a chat message then counts as one token, until the engine
    /// reports the usage.
    is_text_only: bool,
    /// Error to return instead of the next event.
    used_up: Option<Error>,
}

impl TokenCharges {
    /// Charges the tokens of a completion that goes on after `resumed` tokens.
    pub(crate) fn new(reservation: Reservation, resumed: u64) -> Self {
        Self {
            reservation: Some(reservation),
            charged: TokenCount::default(),
            resumed,
            has_started: false,
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
                (self.has_started, self.is_text_only) = (true, started.text_only);
                // An engine that reports 0 reports the number in its usage.
                if started.prompt_tokens > 0 {
                    let prompt = u64::from(started.prompt_tokens) + self.resumed;
                    reservation.charge_prompt(prompt);
                    self.charged.prompt = prompt;
                }
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

    /// Checks that the completion may have another token. If not, ends the completion after the current event.
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
        let error = self.reservation.as_ref().map(Reservation::used_up);
        self.abandon();
        error.unwrap_or_else(Error::internal)
    }

    /// Settles a completion that has ended, by the usage that the engine reports: it may have generated tokens that were
    /// not delivered, such as those of a stop string.
    fn settle(&mut self, usage: v1::Usage) {
        let Some(reservation) = self.reservation.take() else {
            return;
        };
        let prompt = u64::from(usage.prompt_tokens) + self.resumed;
        let completion = u64::from(usage.completion_tokens).saturating_sub(self.resumed);
        reservation.charge_unreserved(TokenCount {
            prompt: prompt.saturating_sub(self.charged.prompt),
            completion: completion.saturating_sub(self.charged.completion),
        });
    }

    /// Settles a completion whose usage is not known. If the engine has not reported the length of the prompt, its
    /// estimate counts.
    fn abandon(&mut self) {
        if let Some(mut reservation) = self.reservation.take()
            && self.has_started
            && self.charged.prompt == 0
        {
            reservation.charge_expected_prompt();
        }
    }
}

impl Drop for TokenCharges {
    fn drop(&mut self) {
        self.abandon();
    }
}

#[cfg(test)]
mod tests;
