//! The JSON objects in a completion's stream, with only the fields that this program reads.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::timestamps::TokenTimestamps;

#[derive(Deserialize)]
pub(super) struct RecordObject<'a> {
    #[serde(borrow)]
    pub(super) choices: Option<Vec<Choice<'a>>>,
    pub(super) stamp: Option<TokenTimestamps>,
    pub(super) error: Option<Value>,
    pub(super) timings: Option<Timings>,
    pub(super) usage: Option<Usage>,
}

#[derive(Deserialize)]
pub(super) struct Choice<'a> {
    #[serde(borrow)]
    pub(super) text: Option<Cow<'a, str>>,
    pub(super) delta: Option<Delta<'a>>,
    pub(super) finish_reason: Option<IgnoredAny>,
}

/// The new part of a chat message.
#[derive(Deserialize)]
pub(super) struct Delta<'a> {
    role: Option<IgnoredAny>,
    #[serde(borrow)]
    pub(super) content: Option<Cow<'a, str>>,
}

/// Timings at the end of a stream, from which only a gateway's resumptions are read. llama.cpp's server also sends an
/// object `timings`, but with none of these fields, so each has a default.
#[derive(Debug, Deserialize)]
pub(crate) struct Timings {
    #[serde(default)]
    pub(crate) resumptions: u32,
    /// Method of the last resumption.
    pub(crate) resumption_method: Option<String>,
}

/// The numbers of tokens that the server counted for a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    #[serde(default)]
    pub(crate) prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct PromptTokensDetails {
    cached_tokens: Option<u32>,
}

impl Delta<'_> {
    pub(super) fn is_role_only(&self) -> bool {
        self.role.is_some() && self.content.is_none()
    }
}

impl Usage {
    /// Returns the number of prompt tokens that the server reused from earlier requests. `None` if the server does not
    /// report it.
    pub(crate) fn cached_tokens(&self) -> Option<u32> {
        self.prompt_tokens_details?.cached_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decoder, Event};
    use super::*;

    /// Decodes server-sent events. Returns the texts and the usage.
    fn decode(objects: &[&str]) -> (Vec<String>, Option<Usage>) {
        let (mut decoder, mut texts, mut usage) = (Decoder::of_http(), Vec::new(), None);
        let body: String = objects
            .iter()
            .map(|object| format!("data: {}\n\n", object.replace('\n', "")))
            .collect();
        let decoded = decoder.read(body.as_bytes(), |event| {
            match event {
                Event::Token(token) => texts.push(token.text.into_owned()),
                Event::Usage(counts) => usage = Some(counts),
                Event::BytesRead(_)
                | Event::Started
                | Event::FinishReason
                | Event::EndOfStream
                | Event::Error(_)
                | Event::Other => {}
            }
            Ok(())
        });
        decoded.unwrap();
        assert_eq!(decoder.missing_part(), None);
        (texts, usage)
    }

    #[test]
    fn a_chat_of_llama_cpps_server_begins_with_a_role_and_ends_with_timings() {
        let (texts, usage) = decode(&[
            r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"Hi"}}]}"#,
            r#"{"choices":[{"finish_reason":"length","index":0,"delta":{}}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":1,"prompt_tokens":9,"total_tokens":10,
                "prompt_tokens_details":{"cached_tokens":4}},"timings":{"prompt_n":5,"predicted_n":1}}"#,
            "[DONE]",
        ]);
        assert_eq!(texts, ["Hi"]);
        let usage = usage.expect("counts");
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (9, 1));
        assert_eq!(usage.cached_tokens(), Some(4));
    }

    #[test]
    fn a_text_of_llama_cpps_server_is_counted_in_the_record_with_the_finish_reason() {
        let (texts, usage) = decode(&[
            r#"{"choices":[{"text":" Paris","index":0,"logprobs":null,"finish_reason":null}]}"#,
            r#"{"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],
                "usage":{"completion_tokens":1,"prompt_tokens":5}}"#,
            "[DONE]",
        ]);
        assert_eq!(texts, [" Paris"]);
        let usage = usage.expect("counts");
        assert_eq!((usage.prompt_tokens, usage.cached_tokens()), (5, None));
    }
}
