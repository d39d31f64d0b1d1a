//! Log probabilities in a chunk of an engine, in both forms of OpenAI's API.
//!
//! A chat has a list of objects, one per token, and llama.cpp's own API has only that list. A completion has parallel
//! lists: of texts, of log probabilities, and so on. llama.cpp sends the first form for completions, too, so the form does not depend on the
//! request.

use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json_text::JsonText;
use crate::request::TokenId;
use crate::tokens::{Logprobs, MIN_LOGPROB, TopLogprob};

#[cfg(test)]
mod tests;

/// A token with its log probabilities.
#[derive(Debug, PartialEq)]
pub(super) struct ScoredToken {
    /// `None` if the engine does not report ids with the log probabilities.
    pub(super) id: Option<TokenId>,
    /// With the bytes of the token.
    pub(super) logprobs: Logprobs,
}

/// The log probabilities have neither form.
#[derive(Debug)]
pub(super) struct MalformedLogprobs;

#[derive(Deserialize)]
struct LogprobsObject<'a> {
    /// The form of chats.
    #[serde(borrow, default)]
    content: Option<Vec<Option<Entry<'a>>>>,
    /// The form of completions. The lists may have different lengths, and any item may be null.
    #[serde(borrow, default)]
    tokens: Option<Vec<Option<JsonText<'a>>>>,
    #[serde(default)]
    token_logprobs: Option<Vec<Option<f32>>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<LikelyTexts>>>,
}

/// A token in the form of chats.
#[derive(Deserialize)]
struct Entry<'a> {
    /// Id of the token (llama.cpp).
    #[serde(default)]
    id: Option<TokenId>,
    #[serde(borrow, default)]
    token: Option<JsonText<'a>>,
    #[serde(default)]
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    logprob: Option<f32>,
    #[serde(borrow, default)]
    top_logprobs: Option<Vec<Option<Entry<'a>>>>,
}

/// Most likely tokens in the form of completions: an object with the texts of the tokens as its keys.
struct LikelyTexts(Vec<(String, Option<f32>)>);

/// Reads the tokens of a chunk. `top` is the number of most likely tokens that the client asked for.
///
/// # Errors
/// The JSON has neither form. Missing parts are no error.
pub(super) fn read(json: &RawValue, top: u32) -> Result<Vec<ScoredToken>, MalformedLogprobs> {
    let json = json.get();
    let top = usize::try_from(top).unwrap_or(usize::MAX);
    if json.starts_with('[') {
        let content = serde_json::from_str(json).map_err(|_| MalformedLogprobs)?;
        return Ok(chat_tokens(content, top));
    }
    let object: LogprobsObject<'_> = serde_json::from_str(json).map_err(|_| MalformedLogprobs)?;
    match object.content {
        Some(content) => Ok(chat_tokens(content, top)),
        None => Ok(completion_tokens(object, top)),
    }
}

fn chat_tokens(content: Vec<Option<Entry<'_>>>, top: usize) -> Vec<ScoredToken> {
    let entries = content.into_iter().flatten();
    entries.map(|entry| entry.into_token(top)).collect()
}

fn completion_tokens(object: LogprobsObject<'_>, top: usize) -> Vec<ScoredToken> {
    let tokens = object.tokens.unwrap_or_default().into_iter();
    let mut logprobs = object.token_logprobs.unwrap_or_default().into_iter();
    let mut likely = object.top_logprobs.unwrap_or_default().into_iter();
    tokens
        .map(|text| {
            let text = text.map(JsonText::to_text).unwrap_or_default();
            let likely = likely
                .next()
                .flatten()
                .map_or(Vec::new(), |likely| likely.0);
            let likely = likely.into_iter().filter_map(|(text, logprob)| {
                Some(TopLogprob {
                    id: 0,
                    token_bytes: bytes_of(&text),
                    logprob: clamp(logprob?),
                })
            });
            ScoredToken {
                id: None,
                logprobs: Logprobs {
                    logprob: logprobs.next().flatten().map(clamp),
                    token_bytes: bytes_of(&text),
                    top: most_likely(likely.collect(), top),
                },
            }
        })
        .collect()
}

impl Entry<'_> {
    fn into_token(mut self, top: usize) -> ScoredToken {
        let likely = self.top_logprobs.take().unwrap_or_default();
        let likely = likely.into_iter().flatten().filter_map(|mut entry| {
            Some(TopLogprob {
                id: entry.id.unwrap_or(0),
                token_bytes: entry.take_bytes(),
                logprob: clamp(entry.logprob?),
            })
        });
        ScoredToken {
            id: self.id,
            logprobs: Logprobs {
                logprob: self.logprob.map(clamp),
                top: most_likely(likely.collect(), top),
                token_bytes: self.take_bytes(),
            },
        }
    }

    /// Returns the bytes of the token, or those of its text if the engine reports no bytes.
    fn take_bytes(&mut self) -> Vec<u8> {
        let text = || self.token.map(|token| token.to_text().into_bytes());
        self.bytes.take().or_else(text).unwrap_or_default()
    }
}

/// Sorts tokens by their probability and returns the first `top`. Some engines add the sampled token to the list.
fn most_likely(mut tokens: Vec<TopLogprob>, top: usize) -> Vec<TopLogprob> {
    tokens.sort_by(|one, other| other.logprob.total_cmp(&one.logprob));
    tokens.truncate(top);
    tokens
}

/// Limits a log probability to what JSON and the gRPC API can have.
fn clamp(logprob: f32) -> f32 {
    logprob.clamp(MIN_LOGPROB, f32::MAX)
}

/// Returns the bytes of a token of the form of completions, where `bytes:\xe2\x96` stands for a token that is no valid
/// UTF-8.
fn bytes_of(text: &str) -> Vec<u8> {
    let escaped = text.strip_prefix("bytes:");
    let unescaped = escaped.and_then(unescape_bytes);
    unescaped.unwrap_or_else(|| text.as_bytes().to_vec())
}

/// Reads bytes with `\x` escapes. Returns `None` if there is no escape or an invalid one.
fn unescape_bytes(text: &str) -> Option<Vec<u8>> {
    let mut parts = text.split("\\x");
    let mut bytes = parts.next()?.as_bytes().to_vec();
    let mut has_escape = false;
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend(rest.as_bytes());
        has_escape = true;
    }
    has_escape.then_some(bytes)
}

/// Divides the text of a delta among its tokens, so that the texts add up to it. A character whose bytes belong to
/// several tokens goes to the last of them. If the bytes of the tokens are not those of the text, as at a stop string,
/// the last token gets the whole text.
pub(super) fn split_text<'a>(text: &'a str, tokens: &[ScoredToken]) -> Vec<&'a str> {
    let mut parts = vec![""; tokens.len()];
    let Some(last) = parts.len().checked_sub(1) else {
        return parts;
    };
    let (mut start, mut end) = (0, 0);
    if is_concatenation(text, tokens) {
        for (part, token) in parts.iter_mut().zip(tokens).take(last) {
            end += token.logprobs.token_bytes.len();
            let boundary = (start..=end).rev().find(|at| text.is_char_boundary(*at));
            let boundary = boundary.unwrap_or(start);
            *part = &text[start..boundary];
            start = boundary;
        }
    }
    parts[last] = &text[start..];
    parts
}

/// Returns true if the bytes of the tokens together are the text.
fn is_concatenation(text: &str, tokens: &[ScoredToken]) -> bool {
    let mut rest = text.as_bytes();
    let are_parts =
        tokens.iter().all(
            |token| match rest.strip_prefix(&*token.logprobs.token_bytes) {
                Some(after) => {
                    rest = after;
                    true
                }
                None => false,
            },
        );
    are_parts && rest.is_empty()
}

impl<'de> Deserialize<'de> for LikelyTexts {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = LikelyTexts;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object with log probabilities")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LikelyTexts, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(LikelyTexts(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
