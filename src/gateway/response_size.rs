//! Estimates and limits the size of responses. Parts are counted before they are collected. A small request therefore
//! cannot make the server hold an arbitrarily large response.

use super::json;
use crate::error::Error;
use crate::proto::v1;
use crate::tokens::TokenBatch;

/// Limit for a unary response, and for the prompts that all choices of a response repeat, in bytes.
const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;

/// Estimated JSON size of a token's log probability without its top log probabilities, in bytes.
const LOGPROB_BYTES: usize = 256;

/// Estimated JSON size of one top log probability, in bytes.
const TOP_LOGPROB_BYTES: usize = 64;

/// Estimated JSON size of a tool call without its texts, in bytes.
const TOOL_CALL_BYTES: usize = 96;

/// Returns the size of a text as a JSON string, without the quotes, in bytes.
pub(super) fn text_size(text: &str) -> usize {
    let escaped = text.bytes().map(|byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 1,
        0..0x20 => 5,
        _ => 0,
    });
    let line_breaks = json::line_breaks(text);
    let line_breaks = line_breaks.map(|(_, found)| found.escape.len() - found.length);
    text.len() + escaped.sum::<usize>() + line_breaks.sum::<usize>()
}

/// Estimates the size of the log probabilities of `tokens` tokens with `top` top log probabilities each, in bytes.
pub(super) fn logprobs_size(tokens: usize, top: usize) -> usize {
    tokens.saturating_mul(LOGPROB_BYTES + top.saturating_mul(TOP_LOGPROB_BYTES))
}

/// Estimates the size of log probabilities without streaming, for tokens with `top` top log probabilities each, in bytes.
/// It is at most the limit for a response.
pub(super) fn expected_size(tokens: u64, top: u32) -> u64 {
    let to_u64 = |size: usize| u64::try_from(size).unwrap_or(u64::MAX);
    let of_token = to_u64(logprobs_size(1, usize::try_from(top).unwrap_or(usize::MAX)));
    tokens
        .saturating_mul(of_token)
        .min(to_u64(MAX_RESPONSE_BYTES))
}

/// Estimates the size of tokens with their log probabilities, in bytes.
pub(super) fn tokens_size(tokens: &TokenBatch) -> usize {
    let logprobs = tokens.iter().filter_map(|token| token.logprobs);
    let logprobs_size = logprobs.map(|logprobs| logprobs_size(1, logprobs.top.len()));
    text_size(tokens.text()) + logprobs_size.sum::<usize>()
}

/// Estimates the size of the parts of a chat message, in bytes.
pub(super) fn chat_delta_size(delta: &v1::ChatDelta) -> usize {
    let call_size = |call: &v1::ToolCallDelta| {
        let texts = [&call.id, &call.r#type, &call.name, &call.arguments];
        TOOL_CALL_BYTES + texts.iter().map(|text| text_size(text)).sum::<usize>()
    };
    text_size(&delta.reasoning_content)
        + text_size(&delta.refusal)
        + delta.tool_calls.iter().map(call_size).sum::<usize>()
}

/// Checks the total size of the prompts that a response repeats.
///
/// # Errors `size` is above the limit.
pub(super) fn check_echo(size: usize) -> Result<(), Error> {
    if size <= MAX_RESPONSE_BYTES {
        return Ok(());
    }
    let message = "The response would be too large: with `echo`, each choice repeats the prompt and \
                   its logprobs. Ask for fewer choices or `logprobs`, or send a shorter prompt.";
    Err(Error::invalid_value("echo", message))
}

/// Checks the size of a unary response so far.
///
/// # Errors `size` is above the limit.
pub(super) fn check_unary(size: usize) -> Result<(), Error> {
    if size <= MAX_RESPONSE_BYTES {
        return Ok(());
    }
    let message = format!(
        "The response is larger than {} MiB, the limit without streaming. Set `stream` to true, or \
         ask for fewer tokens, choices or `logprobs`.",
        MAX_RESPONSE_BYTES / 1024 / 1024
    );
    Err(Error::invalid_value("stream", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_text_is_the_length_of_its_json() {
        for text in [
            "",
            "plain é",
            "a\"b\\c\nd\te\r\u{8}\u{c}",
            "\u{1}\u{1f}\u{7f}",
            "\u{84}\u{85}\u{2027}\u{2028}\u{2029}",
        ] {
            let json = json::to_vec(&text);
            assert_eq!(text_size(text), json.len() - 2, "{text:?}");
        }
    }
}
