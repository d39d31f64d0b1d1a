//! The part of a completion that the client already has.

use super::message_parts::MessageParts;
use crate::proto::v1;
use crate::request::{MAX_CHOICES, TokenId};
use crate::tokens::TextToken;

/// The tokens and the text that the client has of a completion.
#[derive(Clone, Debug)]
pub(in crate::cluster) struct Delivered {
    pub(super) choices: Vec<DeliveredChoice>,
    /// Name of the model that generated the tokens. `None` if there are none yet, or if the client of another gateway
    /// has sent them.
    pub(super) model: Option<String>,
    /// True if the ids of all tokens are known.
    pub(super) has_ids: bool,
    /// True if the id 0 of a token with text may stand for an unknown id.
    pub(super) doubts_zero_ids: bool,
    /// True if the text of all tokens is known.
    pub(super) has_text: bool,
    /// Length of the echoed prompt so far, in bytes.
    pub(super) prompt_text: usize,
    /// Number of tokens of the echoed prompt so far.
    pub(super) prompt_tokens: u32,
    /// Number of tokens of the prompt, if an engine has reported it. 0 if not.
    pub(super) prompt_length: u32,
}

/// The part of one choice that the client has.
#[derive(Clone, Debug, Default)]
pub(in crate::cluster) struct DeliveredChoice {
    /// Token ids, if they are known.
    pub(super) ids: Vec<TokenId>,
    pub(super) text: String,
    /// Parts of the message besides its text.
    pub(super) parts: MessageParts,
    /// Index of the next token.
    pub(super) next_index: u32,
    /// Number of tokens for the usage and the limit. It differs from `next_index` if an engine reports only text.
    pub(super) token_count: u32,
    /// True if a tokenizer has counted the tokens.
    pub(super) is_counted: bool,
    /// Number of tokens at the end that have no text, for example because a character is incomplete.
    pub(super) trailing_without_text: usize,
    /// Number of tokens at the end that have no text or end in white space after which nothing but white space follows.
    pub(super) trailing_white_space: usize,
    pub(super) has_ended: bool,
}

/// Shortest average text of a delta, in bytes, with which the deltas of an engine can be its tokens.
const LEAST_BYTES_PER_TOKEN: usize = 2;
/// Average text of a token, in bytes, for an engine whose deltas are shorter than tokens.
const BYTES_PER_TOKEN: usize = 4;

impl DeliveredChoice {
    /// Returns the number of tokens, as far as it is known. An engine that reports only text counts as sending one token in
    /// each delta, unless its deltas are too short for that, such as single characters.
    pub(super) fn likely_token_count(&self, has_ids: bool) -> u32 {
        let count = usize::try_from(self.token_count).unwrap_or(usize::MAX);
        let are_tokens = self.text.len() >= count.saturating_mul(LEAST_BYTES_PER_TOKEN);
        if has_ids || self.is_counted || are_tokens {
            return self.token_count;
        }
        u32::try_from(self.text.len().div_ceil(BYTES_PER_TOKEN)).unwrap_or(u32::MAX)
    }

    /// Returns the number of tokens at the end that have no text and are part of [`Self::token_count`]. A tokenizer counts
    /// only the text.
    pub(super) fn counted_without_text(&self) -> usize {
        match self.is_counted {
            true => 0,
            false => self.trailing_without_text,
        }
    }
}

impl Delivered {
    /// Returns what the client has when its request arrives: nothing, or the tokens that it wants to resume after.
    pub(in crate::cluster) fn at_start(message: &v1::CompletionRequest) -> Self {
        // An engine rejects a larger `n`, so the limit only bounds the memory here.
        let choices = message.n.unwrap_or(1).min(MAX_CHOICES);
        let choices = usize::try_from(choices).unwrap_or(0);
        let mut delivered = Self {
            choices: vec![DeliveredChoice::default(); choices],
            model: None,
            has_ids: true,
            doubts_zero_ids: false,
            has_text: message.resume.is_empty(),
            prompt_text: 0,
            prompt_tokens: 0,
            prompt_length: 0,
        };
        for resumed in &message.resume {
            if let Some(choice) = delivered.choice_mut(resumed.choice) {
                choice.ids.clone_from(&resumed.token_ids);
                choice.next_index = u32::try_from(resumed.token_ids.len()).unwrap_or(u32::MAX);
                choice.token_count = choice.next_index;
            }
        }
        delivered
    }

    /// Returns true if the client has no part of the completion yet.
    pub(in crate::cluster) fn is_empty(&self) -> bool {
        let is_empty = |choice: &DeliveredChoice| {
            choice.next_index == 0 && !choice.has_ended && choice.parts.is_empty()
        };
        self.prompt_text == 0 && self.choices.iter().all(is_empty)
    }

    /// Returns true if the client has all of the completion but the summary.
    pub(in crate::cluster) fn has_all_choices(&self) -> bool {
        self.choices.iter().all(|choice| choice.has_ended)
    }

    /// Returns the number of tokens that the client has.
    pub(in crate::cluster) fn token_count(&self) -> u32 {
        let counts = self.choices.iter().map(|choice| choice.token_count);
        counts.fold(0, u32::saturating_add)
    }

    /// Returns true if a model of this name generated the delivered tokens, as far as is known.
    pub(in crate::cluster) fn is_same_model(&self, model: &str) -> bool {
        self.model.as_deref().is_none_or(|it| it == model)
    }

    /// Returns true if the text of a choice ends with the start of a stop string. The next engine would not see the match.
    pub(super) fn ends_within_stop_string(&self, stops: &[String]) -> bool {
        let ends_within = |text: &str, stop: &String| {
            let starts = stop.char_indices().skip(1).map(|(at, _)| &stop[..at]);
            starts.into_iter().any(|start| text.ends_with(start))
        };
        let open = self.choices.iter().filter(|choice| !choice.has_ended);
        open.into_iter()
            .any(|choice| stops.iter().any(|stop| ends_within(&choice.text, stop)))
    }

    /// Returns the text of each choice whose number of tokens is not known exactly, with its index.
    pub(in crate::cluster) fn uncounted_texts(&self) -> Vec<(usize, String)> {
        if self.has_ids {
            return Vec::new();
        }
        let choices = self.choices.iter().enumerate();
        let uncounted = choices.filter(|(_, choice)| !choice.has_ended && !choice.text.is_empty());
        uncounted
            .map(|(at, choice)| (at, choice.text.clone()))
            .collect()
    }

    /// Sets the number of tokens of a choice, as a tokenizer counts them.
    pub(in crate::cluster) fn set_token_count(&mut self, choice: usize, count: usize) {
        let choice = &mut self.choices[choice];
        choice.token_count = u32::try_from(count).unwrap_or(u32::MAX);
        choice.is_counted = true;
    }

    /// Returns the number of tokens of the prompt, or 0 if it is not known.
    pub(in crate::cluster) fn prompt_length(&self) -> u32 {
        self.prompt_length
    }

    /// Records the facts that an engine reports when it starts the completion with this model.
    ///
    /// `always_has_ids` is true for engines that report an id with every token. Others may send text without ids, which
    /// then have the id 0.
    pub(in crate::cluster) fn record_start(
        &mut self,
        started: &v1::Started,
        model: &str,
        always_has_ids: bool,
    ) {
        self.has_ids &= !started.text_only;
        self.doubts_zero_ids = !always_has_ids;
        if self.model.as_deref() != Some(model) {
            // Ids of two models cannot be mixed.
            self.has_ids &= self.model.is_none() || self.token_count() == 0;
            self.model = Some(model.to_owned());
        }
        if self.prompt_length == 0 {
            self.prompt_length = started.prompt_tokens;
        }
    }

    /// Records tokens that the client receives now. They must continue their choice.
    pub(in crate::cluster) fn record_tokens(&mut self, tokens: &v1::Tokens) {
        let is_unknown = |token: TextToken<'_>| token.id == 0 && !token.text.is_empty();
        if self.doubts_zero_ids && tokens.tokens.iter().any(is_unknown) {
            self.has_ids = false;
        }
        let (has_ids, has_text) = (self.has_ids, self.has_text);
        let Some(choice) = self.choice_mut(tokens.choice) else {
            return;
        };
        let count = u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
        choice.next_index = choice.next_index.saturating_add(count);
        choice.token_count = choice.token_count.saturating_add(count);
        choice.is_counted &= count == 0;
        for token in tokens.tokens.iter() {
            if has_ids {
                choice.ids.push(token.id);
            }
            choice.trailing_without_text = match token.text {
                "" => choice.trailing_without_text + 1,
                _ => 0,
            };
            choice.trailing_white_space = match token.text.trim_end() {
                "" => choice.trailing_white_space + 1,
                text => usize::from(text.len() < token.text.len()),
            };
        }
        if has_text {
            choice.text.push_str(tokens.tokens.text());
        }
        choice.has_ended |= tokens.finish_reason != 0;
    }

    /// Records parts of a message that the client receives now.
    pub(in crate::cluster) fn record_chat(&mut self, delta: &v1::ChatDelta) {
        if let Some(choice) = self.choice_mut(delta.choice) {
            choice.parts.record(delta);
        }
    }

    /// Returns true if the client has parts of a message besides its text.
    pub(in crate::cluster) fn has_message_parts(&self) -> bool {
        self.choices.iter().any(|choice| !choice.parts.is_empty())
    }

    /// Removes the part of an echoed prompt that the client has, and records the rest. Returns false if nothing is left.
    pub(in crate::cluster) fn record_prompt(
        &mut self,
        part: &mut v1::EchoedPrompt,
        position: &mut PromptPosition,
    ) -> bool {
        let known_text = self.prompt_text.saturating_sub(position.text);
        position.text += part.text.len();
        part.text.drain(..floor_boundary(&part.text, known_text));
        if let Some(tokens) = &mut part.tokens {
            let known = self.prompt_tokens.saturating_sub(position.tokens);
            let count = u32::try_from(tokens.tokens.len()).unwrap_or(u32::MAX);
            position.tokens = position.tokens.saturating_add(count);
            let known = known.min(count);
            let batch = std::mem::take(&mut tokens.tokens);
            tokens.tokens = batch.skip_first(usize::try_from(known).unwrap_or(usize::MAX));
            tokens.first_index = tokens.first_index.saturating_add(known);
            self.prompt_tokens = self.prompt_tokens.max(position.tokens);
        }
        self.prompt_text = self.prompt_text.max(position.text);
        let has_tokens = part.tokens.as_ref().is_some_and(|it| !it.tokens.is_empty());
        !part.text.is_empty() || has_tokens
    }

    fn choice_mut(&mut self, index: u32) -> Option<&mut DeliveredChoice> {
        let index = usize::try_from(index).ok()?;
        self.choices.get_mut(index)
    }
}

/// Position in the prompt that an engine echoes.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cluster) struct PromptPosition {
    text: usize,
    pub(in crate::cluster) tokens: u32,
}

/// Returns the largest offset up to `at` that is a character boundary of `text`.
fn floor_boundary(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at.min(text.len()))
}
