//! Log probabilities as OpenAI shows them, in the two forms of its two kinds of completion.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::tokens::{Logprobs, TextToken};

/// The log probabilities of a completion's tokens: lists of the same length.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct CompletionLogprobs {
    /// How each token is spelled. One that is no text by itself is its bytes, such as `bytes:\xe2\x96`.
    tokens: Vec<String>,
    /// Each token's log probability; null for a prompt's first token, which nothing comes before.
    token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens at each position, and the token itself.
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token's text begins within its choice, in characters.
    text_offset: Vec<u64>,
}

/// The log probabilities of a chat's tokens.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct ChatLogprobs {
    /// Those of the answer's tokens.
    content: Vec<TokenLogprob>,
    /// Always null: nothing here refuses to answer.
    #[schema(required)]
    refusal: Option<Vec<TokenLogprob>>,
}

/// A token's log probability.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
struct TokenLogprob {
    /// How it is spelled, with U+FFFD for what is no text by itself.
    token: String,
    /// Its log probability.
    logprob: f32,
    /// Its bytes.
    bytes: Vec<u8>,
    /// The likeliest tokens at its position.
    top_logprobs: Vec<LikelyToken>,
}

/// One of the likeliest tokens of a position.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
struct LikelyToken {
    /// How it is spelled, with U+FFFD for what is no text by itself.
    token: String,
    /// Its log probability.
    logprob: f32,
    /// Its bytes.
    bytes: Vec<u8>,
}

impl CompletionLogprobs {
    /// Appends a token whose text begins at this character of its choice. One that came without its log
    /// probability is passed over.
    pub(super) fn push(&mut self, token: &TextToken<'_>, text_offset: u64) {
        let Some(logprobs) = token.logprobs else {
            return;
        };
        let spelled = spelled(&logprobs.token_bytes);
        self.top_logprobs.push(logprobs.logprob.map(|logprob| {
            let mut top = BTreeMap::new();
            for likely in &logprobs.top {
                // Two tokens may be spelled alike; the likelier comes first.
                let name = self::spelled(&likely.token_bytes);
                top.entry(name).or_insert(likely.logprob);
            }
            top.entry(spelled.clone()).or_insert(logprob);
            top
        }));
        self.tokens.push(spelled);
        self.token_logprobs.push(logprobs.logprob);
        self.text_offset.push(text_offset);
    }

    /// Whether no token is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

impl ChatLogprobs {
    /// Appends a token. One that came without its log probability is passed over.
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

    /// Whether no token is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.content.is_empty()
    }
}

/// How many characters a text has.
pub(super) fn characters(text: &str) -> u64 {
    u64::try_from(text.chars().count()).unwrap_or(u64::MAX)
}

/// The token as text, or its bytes as OpenAI spells them.
fn spelled(bytes: &[u8]) -> String {
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
            // Two tokens that are spelled alike.
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
