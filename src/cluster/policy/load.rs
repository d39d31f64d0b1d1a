//! The load of an engine: the tokens that its open requests still need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::request::{DEFAULT_MAX_TOKENS, MAX_CHOICES};

/// Assumed number of tokens of a chat's answer if the request sets no limit.
const CHAT_TOKENS: u64 = 256;
/// Assumed number of bytes of a prompt's token.
pub(in crate::cluster) const BYTES_PER_TOKEN: usize = 4;

/// Load of one engine. Clones share the load.
#[derive(Clone, Debug, Default)]
pub(in crate::cluster) struct Load(Arc<AtomicU64>);

/// The tokens that one request still needs. They count in the load of its engine until the guard is dropped.
#[derive(Debug)]
pub(in crate::cluster) struct OutstandingTokens {
    load: Load,
    prompt: u64,
    completion: u64,
}

/// Load relative to the weight of a target. Loads are compared exactly, without division.
#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct WeightedLoad {
    pub(in crate::cluster) tokens: u64,
    /// At least 1.
    pub(in crate::cluster) weight: u32,
}

impl Load {
    pub(in crate::cluster) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds the tokens that a request is expected to need.
    pub(in crate::cluster) fn add(&self, message: &v1::CompletionRequest) -> OutstandingTokens {
        let guard = OutstandingTokens {
            load: self.clone(),
            prompt: expected_prompt_tokens(message),
            completion: expected_completion_tokens(message),
        };
        let tokens = guard.prompt + guard.completion;
        self.0.fetch_add(tokens, Ordering::Relaxed);
        guard
    }
}

impl OutstandingTokens {
    /// Records tokens that the engine has generated. The first of them shows that it has processed the prompt.
    pub(in crate::cluster) fn record_tokens(&mut self, tokens: usize) {
        let tokens = u64::try_from(tokens).unwrap_or(u64::MAX);
        // One token stays counted until the request ends, so that an engine with more requests has a higher load.
        let done = tokens.min(self.completion.saturating_sub(1));
        self.completion -= done;
        let done = done + std::mem::take(&mut self.prompt);
        if done > 0 {
            self.load.0.fetch_sub(done, Ordering::Relaxed);
        }
    }
}

impl Drop for OutstandingTokens {
    fn drop(&mut self) {
        let rest = self.prompt + self.completion;
        self.load.0.fetch_sub(rest, Ordering::Relaxed);
    }
}

impl WeightedLoad {
    /// Compares the tokens for each unit of weight.
    pub(in crate::cluster) fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let scaled = |one: &Self, other: &Self| u128::from(one.tokens) * u128::from(other.weight);
        scaled(self, other).cmp(&scaled(other, self))
    }
}

/// Estimates the number of tokens of a prompt. It is exact for token ids.
pub(in crate::cluster) fn expected_prompt_tokens(message: &v1::CompletionRequest) -> u64 {
    let tokens = match &message.input {
        Some(Input::PromptTokenIds(prompt)) => prompt.ids.len(),
        Some(Input::Prompt(text)) => text.len() / BYTES_PER_TOKEN,
        Some(Input::Chat(chat)) => {
            let lengths = chat.messages.iter().map(|message| message.content.len());
            lengths.sum::<usize>() / BYTES_PER_TOKEN
        }
        None => 0,
    };
    u64::try_from(tokens).unwrap_or(0)
}

fn expected_completion_tokens(message: &v1::CompletionRequest) -> u64 {
    let default = match message.input {
        Some(Input::Chat(_)) => CHAT_TOKENS,
        Some(Input::Prompt(_) | Input::PromptTokenIds(_)) | None => DEFAULT_MAX_TOKENS.into(),
    };
    let each = message.max_tokens.map_or(default, u64::from).max(1);
    each * u64::from(message.n.unwrap_or(1).clamp(1, MAX_CHOICES))
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering::{Equal, Greater, Less};

    use super::*;

    fn request(prompt: &str, max_tokens: Option<u32>, n: u32) -> v1::CompletionRequest {
        v1::CompletionRequest {
            input: Some(Input::Prompt(prompt.to_owned())),
            max_tokens,
            n: Some(n),
            ..v1::CompletionRequest::default()
        }
    }

    #[test]
    fn a_request_counts_its_prompt_and_its_limit_until_it_ends() {
        let load = Load::default();
        let mut first = load.add(&request("12345678", Some(10), 2));
        assert_eq!(load.get(), 22);
        first.record_tokens(5);
        assert_eq!(load.get(), 15, "the prompt and five tokens are done");
        first.record_tokens(1_000);
        assert_eq!(load.get(), 1);
        let second = load.add(&request("", None, 1));
        assert_eq!(load.get(), 17);
        drop(first);
        drop(second);
        assert_eq!(load.get(), 0);
    }

    #[test]
    fn a_target_of_twice_the_weight_takes_twice_the_tokens() {
        let load = |tokens, weight| WeightedLoad { tokens, weight };
        assert_eq!(load(10, 1).cmp(&load(20, 2)), Equal);
        assert_eq!(load(10, 1).cmp(&load(21, 2)), Less);
        assert_eq!(load(u64::MAX, 1).cmp(&load(u64::MAX, 2)), Greater);
    }
}
