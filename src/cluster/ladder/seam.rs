//! Joins the tokens of an engine to the tokens that the client already has: checks their indices, removes what the
//! engine repeats, and numbers the rest.

use super::delivered::{Delivered, DeliveredChoice};
use super::message_parts::PartsPosition;
use crate::proto::v1;
use crate::request::TokenId;
use crate::tokens::{TextToken, TokenBatch};

/// The seam between the delivered tokens and those of one engine's stream.
#[derive(Debug)]
pub(in crate::cluster) struct Seam {
    choices: Vec<ChoiceSeam>,
}

/// An engine's stream does not continue what the client has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::cluster) enum SeamError {
    /// Tokens do not continue their choice.
    #[error("The engine sent tokens with an unexpected choice or index.")]
    UnexpectedIndex,
    /// A replay differs from the delivered text.
    #[error("The engine's stream broke, and another run of the request gave a different text.")]
    DifferentText,
}

/// The seam of one choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ChoiceSeam {
    /// Index that the engine's next token must have.
    pub(super) engine_index: u32,
    /// Text that the engine must repeat, as an offset in the delivered text. `None` if it repeats no text.
    pub(super) repeated_from: Option<usize>,
    /// Number of delivered tokens without text that the engine may repeat.
    pub(super) repeated_tokens: usize,
    /// Position of the stream in the delivered parts of the message that it must repeat. `None` if it repeats none.
    pub(super) repeated_parts: Option<PartsPosition>,
    /// True if the client has the whole choice, so that the engine's tokens are dropped.
    pub(super) is_dropped: bool,
}

impl Seam {
    /// Creates the seam of a stream whose choices continue as described.
    pub(super) fn new(choices: Vec<ChoiceSeam>) -> Self {
        Self { choices }
    }

    /// Creates the seam of a stream that starts a completion, or continues it after the delivered tokens.
    pub(in crate::cluster) fn continuing(delivered: &Delivered) -> Self {
        let seam = |choice: &DeliveredChoice| ChoiceSeam {
            engine_index: choice.next_index,
            is_dropped: choice.has_ended,
            ..ChoiceSeam::default()
        };
        Self::new(delivered.choices.iter().map(seam).collect())
    }

    /// Creates the seam of a stream that repeats the completion from its start.
    pub(super) fn replaying(delivered: &Delivered) -> Self {
        let seam = |choice: &DeliveredChoice| ChoiceSeam {
            repeated_from: (!choice.text.is_empty()).then_some(0),
            repeated_tokens: choice.trailing_without_text,
            repeated_parts: (!choice.parts.is_empty()).then(PartsPosition::default),
            is_dropped: choice.has_ended,
            ..ChoiceSeam::default()
        };
        Self::new(delivered.choices.iter().map(seam).collect())
    }

    /// Converts tokens of the engine to those that the client gets next. Returns `None` if the client has all of them.
    ///
    /// # Errors
    /// The tokens do not continue their choice, or they differ from the delivered text that they should repeat.
    pub(in crate::cluster) fn join(
        &mut self,
        mut tokens: v1::Tokens,
        delivered: &Delivered,
    ) -> Result<Option<v1::Tokens>, SeamError> {
        let at = usize::try_from(tokens.choice).unwrap_or(usize::MAX);
        let (seam, choice) = match (self.choices.get_mut(at), delivered.choices.get(at)) {
            (Some(seam), Some(choice)) if tokens.first_index == seam.engine_index => (seam, choice),
            (Some(_) | None, _) => return Err(SeamError::UnexpectedIndex),
        };
        let count = u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        seam.engine_index = seam.engine_index.saturating_add(count);
        if seam.is_dropped {
            return Ok(None);
        }
        if choice.has_ended {
            return Err(SeamError::UnexpectedIndex);
        }
        if seam.repeats() {
            tokens.tokens = seam.remove_repeated(&tokens.tokens, choice)?;
        }
        let has_ended = tokens.finish_reason != 0;
        let is_new = has_ended || !tokens.tokens.is_empty();
        let has_repeated_all = seam.repeated_from.is_none() && seam.repeated_parts.is_none();
        if is_new && !has_repeated_all {
            return Err(SeamError::DifferentText);
        }
        tokens.first_index = choice.next_index;
        Ok(is_new.then_some(tokens))
    }

    /// Removes from the parts of a message what the client has. Returns `None` if it has all of them.
    ///
    /// # Errors
    /// The parts differ from the delivered ones, or belong to no choice.
    pub(in crate::cluster) fn join_chat(
        &mut self,
        mut delta: v1::ChatDelta,
        delivered: &Delivered,
    ) -> Result<Option<v1::ChatDelta>, SeamError> {
        let at = usize::try_from(delta.choice).unwrap_or(usize::MAX);
        let (seam, choice) = match (self.choices.get_mut(at), delivered.choices.get(at)) {
            (Some(seam), Some(choice)) => (seam, choice),
            (Some(_) | None, _) => return Err(SeamError::UnexpectedIndex),
        };
        if seam.is_dropped {
            return Ok(None);
        }
        if choice.has_ended {
            return Err(SeamError::UnexpectedIndex);
        }
        if let Some(position) = &mut seam.repeated_parts {
            choice.parts.remove_repeated(position, &mut delta)?;
            if choice.parts.is_reached_by(position) {
                seam.repeated_parts = None;
            }
        }
        let is_empty = delta.tool_calls.is_empty()
            && delta.reasoning_content.is_empty()
            && delta.refusal.is_empty();
        Ok((!is_empty).then_some(delta))
    }
}

impl ChoiceSeam {
    fn repeats(&self) -> bool {
        self.repeated_from.is_some() || self.repeated_tokens > 0
    }

    /// Removes the tokens that the client already has, and the repeated part of the token that goes beyond them.
    fn remove_repeated(
        &mut self,
        batch: &TokenBatch,
        choice: &DeliveredChoice,
    ) -> Result<TokenBatch, SeamError> {
        let mut rest = TokenBatch::default();
        for token in batch.iter() {
            if let Some(from) = self.repeated_from {
                let repeated = self.match_text(from, token.text, &choice.text)?;
                let text = &token.text[repeated..];
                if !text.is_empty() {
                    rest.push(TextToken { text, ..token });
                }
            } else if self.repeated_tokens == 0 || !self.repeats_token(token.id, token.text, choice)
            {
                rest.push(token);
            }
        }
        Ok(rest)
    }

    /// Compares a token's text with the delivered text at this offset. Returns the length of the repeated part.
    fn match_text(&mut self, from: usize, text: &str, delivered: &str) -> Result<usize, SeamError> {
        let left = &delivered[from..];
        let repeated = left.len().min(text.len());
        if left.as_bytes()[..repeated] != text.as_bytes()[..repeated] {
            return Err(SeamError::DifferentText);
        }
        let next = from + repeated;
        self.repeated_from = (next < delivered.len()).then_some(next);
        Ok(repeated)
    }

    /// Returns true if a token repeats the next of the delivered tokens without text.
    fn repeats_token(&mut self, id: TokenId, text: &str, choice: &DeliveredChoice) -> bool {
        let position = choice.ids.len().checked_sub(self.repeated_tokens);
        let expected = position.and_then(|at| choice.ids.get(at));
        if expected == Some(&id) && text.is_empty() {
            self.repeated_tokens -= 1;
            return true;
        }
        // The engine continues in another way. Nothing is lost, because the repeated tokens have no text.
        self.repeated_tokens = 0;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::Timestamps;

    fn tokens(first_index: u32, tokens: &[(TokenId, &str)], ended: bool) -> v1::Tokens {
        let mut batch = TokenBatch::default();
        for (id, text) in tokens {
            batch.push_with(*id, Timestamps::default(), |out| out.push_str(text));
        }
        v1::Tokens {
            first_index,
            tokens: batch,
            finish_reason: i32::from(ended),
            ..v1::Tokens::default()
        }
    }

    fn delivered(sent: &[(TokenId, &str)]) -> Delivered {
        let mut delivered = Delivered::at_start(&v1::CompletionRequest::default());
        delivered.record_tokens(&tokens(0, sent, false));
        delivered
    }

    /// First index and tokens that a client gets.
    type Joined = Option<(u32, Vec<(TokenId, String)>)>;

    /// Joins a batch. Returns what the client gets.
    fn join(
        seam: &mut Seam,
        delivered: &Delivered,
        batch: v1::Tokens,
    ) -> Result<Joined, SeamError> {
        let joined = seam.join(batch, delivered)?;
        Ok(joined.map(|joined| {
            let tokens = joined.tokens.iter();
            let tokens = tokens.map(|token| (token.id, token.text.to_owned()));
            (joined.first_index, tokens.collect())
        }))
    }

    #[test]
    fn a_gap_a_repetition_and_an_unknown_choice_are_errors() {
        let has = delivered(&[(1, "a"), (2, "b")]);
        for first_index in [1, 3] {
            let mut seam = Seam::continuing(&has);
            let batch = tokens(first_index, &[(3, "c")], false);
            assert!(join(&mut seam, &has, batch).is_err(), "{first_index}");
        }
        let mut batch = tokens(2, &[(3, "c")], false);
        batch.choice = 1;
        assert!(join(&mut Seam::continuing(&has), &has, batch).is_err());
    }

    #[test]
    fn a_replay_passes_on_what_follows_the_delivered_text() {
        let has = delivered(&[(1, "He"), (2, "llo w\u{f6}")]);
        let mut seam = Seam::replaying(&has);
        let part = |first, batch: &[(TokenId, &str)]| tokens(first, batch, false);
        let first = join(&mut seam, &has, part(0, &[(0, "Hell"), (0, ""), (0, "o")]));
        assert_eq!(first, Ok(None));
        let second = join(&mut seam, &has, part(3, &[(0, " w\u{f6}rld"), (0, "!")]));
        let rest = vec![(0, "rld".to_owned()), (0, "!".to_owned())];
        assert_eq!(second, Ok(Some((2, rest))));
    }

    #[test]
    fn a_replay_does_not_repeat_the_last_tokens_without_text() {
        let has = delivered(&[(1, "a"), (2, ""), (3, "")]);
        let mut seam = Seam::replaying(&has);
        let replayed = tokens(0, &[(1, "a"), (2, ""), (3, ""), (4, "\u{e9}")], false);
        let joined = join(&mut seam, &has, replayed);
        assert_eq!(joined, Ok(Some((3, vec![(4, "\u{e9}".to_owned())]))));
    }

    #[test]
    fn a_replay_that_differs_or_ends_early_is_an_error() {
        let has = delivered(&[(1, "Hello")]);
        let mut seam = Seam::replaying(&has);
        assert!(join(&mut seam, &has, tokens(0, &[(0, "Help")], false)).is_err());
        let mut seam = Seam::replaying(&has);
        assert!(join(&mut seam, &has, tokens(0, &[(0, "Hell")], true)).is_err());
        let mut seam = Seam::replaying(&has);
        let whole = join(&mut seam, &has, tokens(0, &[(0, "Hello")], true));
        assert_eq!(whole, Ok(Some((1, Vec::new()))));
    }

    #[test]
    fn a_tool_call_in_several_parts_passes_unchanged_in_the_first_stream() {
        let mut delivered = Delivered::at_start(&v1::CompletionRequest::default());
        let mut seam = Seam::continuing(&delivered);
        for arguments in ["{", "{", "\"a\": 1}}"] {
            let call = v1::ToolCallDelta {
                arguments: arguments.to_owned(),
                ..v1::ToolCallDelta::default()
            };
            let delta = v1::ChatDelta {
                tool_calls: vec![call],
                ..v1::ChatDelta::default()
            };
            let joined = seam.join_chat(delta.clone(), &delivered);
            assert_eq!(joined, Ok(Some(delta.clone())));
            delivered.record_chat(&delta);
        }
    }

    #[test]
    fn new_text_before_the_reasoning_is_repeated_is_another_text() {
        let mut delivered = Delivered::at_start(&v1::CompletionRequest::default());
        delivered.record_chat(&v1::ChatDelta {
            reasoning_content: "I think so.".to_owned(),
            ..v1::ChatDelta::default()
        });
        let mut seam = Seam::replaying(&delivered);
        let text = tokens(0, &[(1, "yes")], false);
        assert_eq!(
            join(&mut seam, &delivered, text),
            Err(SeamError::DifferentText)
        );
    }

    #[test]
    fn repeated_tokens_without_text_are_removed_until_one_differs() {
        let has = delivered(&[(1, "a"), (2, ""), (3, "")]);
        let seam = || {
            Seam::new(vec![ChoiceSeam {
                repeated_tokens: 2,
                ..ChoiceSeam::default()
            }])
        };
        let same = tokens(0, &[(2, ""), (3, ""), (4, "\u{e9}")], false);
        let joined = join(&mut seam(), &has, same);
        assert_eq!(joined, Ok(Some((3, vec![(4, "\u{e9}".to_owned())]))));
        let other = tokens(0, &[(2, ""), (9, "x")], false);
        let joined = join(&mut seam(), &has, other);
        assert_eq!(joined, Ok(Some((3, vec![(9, "x".to_owned())]))));
    }

    #[test]
    fn tokens_of_an_ended_choice_are_dropped_after_the_seam_and_wrong_before_it() {
        let mut has = delivered(&[(1, "a")]);
        let mut before = Seam::continuing(&has);
        has.record_tokens(&tokens(1, &[], true));
        assert!(join(&mut before, &has, tokens(1, &[(2, "b")], false)).is_err());
        let mut after = Seam::continuing(&has);
        assert_eq!(
            join(&mut after, &has, tokens(1, &[(2, "b")], true)),
            Ok(None)
        );
    }
}
