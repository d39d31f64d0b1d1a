//! Log probabilities in OpenAI's formats: one for completions, another for chat completions.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::gateway::dialect::ScoredTokens;
use crate::gateway::echoed_prompts::PromptEcho;
use crate::tokens::{Logprobs, TextToken, TokenBatch};

/// Log probabilities of the tokens of a completion. All lists have one item per token.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct CompletionLogprobs {
    /// Text of each token. A token that is not valid UTF-8 is shown as its bytes, such as `bytes:\xe2\x96`.
    tokens: Vec<String>,
    /// Log probability of each token; null for the first token of a prompt, which has no context.
    token_logprobs: Vec<Option<f32>>,
    /// Most likely tokens at each position, and the token itself.
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Offset of each token's text within its choice, in characters.
    text_offset: Vec<u64>,
}

/// Log probabilities of the tokens of a chat completion.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    /// One item per token of the message.
    content: Vec<TokenLogprob>,
    /// Always null: the server does not detect refusals.
    #[schema(required)]
    refusal: Option<Vec<TokenLogprob>>,
}

/// Log probability of one token.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
struct TokenLogprob {
    /// Text of the token, with invalid UTF-8 replaced by U+FFFD.
    token: String,
    /// Log probability of the token.
    logprob: f32,
    /// Bytes of the token.
    bytes: Vec<u8>,
    /// Most likely tokens at this position.
    top_logprobs: Vec<LikelyToken>,
}

/// One of the most likely tokens at a position.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
struct LikelyToken {
    /// Text of the token, with invalid UTF-8 replaced by U+FFFD.
    token: String,
    /// Log probability of the token.
    logprob: f32,
    /// Bytes of the token.
    bytes: Vec<u8>,
}

impl CompletionLogprobs {
    /// Converts the log probabilities of a prompt's tokens.
    pub(super) fn of_prompt(prompt: &PromptEcho) -> Self {
        let mut logprobs = Self::default();
        let mut offset = 0;
        for token in prompt.tokens.iter().flat_map(TokenBatch::iter) {
            logprobs.push(&token, offset);
            offset += char_count(token.text);
        }
        logprobs
    }

    /// Converts the log probabilities of a whole choice. They follow those of the choice's prompt, if the request
    /// sets `echo`.
    pub(super) fn of_choice(tokens: &ScoredTokens) -> Self {
        let prompt = tokens.prompt.as_ref();
        let mut logprobs = prompt.map_or_else(Self::default, |prompt| Self::of_prompt(prompt));
        let mut offset = prompt.map_or(0, |prompt| char_count(&prompt.text));
        for token in tokens.generated.iter().flat_map(TokenBatch::iter) {
            logprobs.push(&token, offset);
            offset += char_count(token.text);
        }
        logprobs
    }

    /// Appends a token. `text_offset` counts characters from the start of the choice. A token without log
    /// probabilities is skipped.
    pub(super) fn push(&mut self, token: &TextToken<'_>, text_offset: u64) {
        let Some(logprobs) = token.logprobs else {
            return;
        };
        let text = token_text(&logprobs.token_bytes);
        self.top_logprobs.push(logprobs.logprob.map(|logprob| {
            let mut top = BTreeMap::new();
            for likely in &logprobs.top {
                // Different tokens may have the same text. The first of them is the most likely one, so it is kept.
                let text = token_text(&likely.token_bytes);
                top.entry(text).or_insert(likely.logprob);
            }
            top.entry(text.clone()).or_insert(logprob);
            top
        }));
        self.tokens.push(text);
        self.token_logprobs.push(logprobs.logprob);
        self.text_offset.push(text_offset);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

impl ChatLogprobs {
    /// Converts the log probabilities of a whole choice.
    pub(super) fn of_choice(tokens: &ScoredTokens) -> Self {
        let mut logprobs = Self::default();
        for token in tokens.generated.iter().flat_map(TokenBatch::iter) {
            logprobs.push(&token);
        }
        logprobs
    }

    /// Appends a token. A token without a log probability is skipped.
    pub(super) fn push(&mut self, token: &TextToken<'_>) {
        let Some(Logprobs {
            logprob: Some(logprob),
            token_bytes,
            top,
        }) = token.logprobs
        else {
            return;
        };
        let likely = top.iter().map(|likely| LikelyToken {
            token: String::from_utf8_lossy(&likely.token_bytes).into_owned(),
            logprob: likely.logprob,
            bytes: likely.token_bytes.clone(),
        });
        self.content.push(TokenLogprob {
            token: String::from_utf8_lossy(token_bytes).into_owned(),
            logprob: *logprob,
            bytes: token_bytes.clone(),
            top_logprobs: likely.collect(),
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.content.is_empty()
    }
}

pub(super) fn char_count(text: &str) -> u64 {
    u64::try_from(text.chars().count()).unwrap_or(u64::MAX)
}

/// Returns the text of a token, or its escaped bytes in OpenAI's notation if it is not valid UTF-8.
fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let bytes = bytes.iter().map(|byte| match byte {
                b' '..=b'~' => char::from(*byte).to_string(),
                other => format!("\\x{other:02x}"),
            });
            format!("bytes:{}", bytes.collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tokens::{Timestamps, TopLogprob};

    fn top(token_bytes: &[u8], logprob: f32) -> TopLogprob {
        TopLogprob {
            id: 0,
            token_bytes: token_bytes.to_vec(),
            logprob,
        }
    }

    fn token(logprobs: &Logprobs) -> TextToken<'_> {
        TextToken {
            id: 0,
            text: "",
            timestamps: Timestamps::default(),
            logprobs: Some(logprobs),
        }
    }

    #[test]
    fn the_sampled_token_is_always_listed_in_top_logprobs() {
        let logprobs = Logprobs {
            logprob: Some(-3.5),
            token_bytes: b"\xe2\x96a".to_vec(),
            // Two tokens with the same text.
            top: vec![top(b"b", -0.5), top(b"b", -1.5)],
        };
        let mut shown = CompletionLogprobs::default();
        shown.push(&token(&logprobs), 7);
        let expected = json!({
            "tokens": ["bytes:\\xe2\\x96a"],
            "token_logprobs": [-3.5],
            "top_logprobs": [{"b": -0.5, "bytes:\\xe2\\x96a": -3.5}],
            "text_offset": [7],
        });
        assert_eq!(json!(shown), expected);
    }

    #[test]
    fn a_prompts_first_token_has_no_log_probability() {
        let logprobs = Logprobs {
            token_bytes: b"a".to_vec(),
            ..Logprobs::default()
        };
        let mut shown = CompletionLogprobs::default();
        shown.push(&token(&logprobs), 0);
        let expected = json!({
            "tokens": ["a"], "token_logprobs": [null], "top_logprobs": [null], "text_offset": [0],
        });
        assert_eq!(json!(shown), expected);
    }

    #[test]
    fn chat_logprobs_have_the_exact_bytes_of_each_token() {
        let logprobs = Logprobs {
            logprob: Some(-0.5),
            token_bytes: b"\xf0\x9f".to_vec(),
            top: vec![top(b"b", -0.25)],
        };
        let mut shown = ChatLogprobs::default();
        shown.push(&token(&logprobs));
        let expected = json!({
            "content": [{
                "token": "\u{fffd}", "logprob": -0.5, "bytes": [0xf0, 0x9f],
                "top_logprobs": [{"token": "b", "logprob": -0.25, "bytes": [0x62]}],
            }],
            "refusal": null,
        });
        assert_eq!(json!(shown), expected);
    }
}
