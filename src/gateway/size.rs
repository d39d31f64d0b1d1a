//! What an answer takes: its parts are counted before they are gathered, so that no small request makes a large
//! one without end.

use super::json;
use crate::error::Error;
use crate::tokens::TokenBatch;

/// What one answer may take, in bytes, about: what is gathered of an answer in one piece, and what all choices
/// repeat of their prompts.
pub(super) const LIMIT: usize = 64 * 1024 * 1024;

/// An answer in one piece that is larger is written on a thread that may take its time.
pub(super) const LARGE: usize = 1024 * 1024;

/// What the log probability of a token takes, and each of those of the likeliest beside it.
const LOGPROB: usize = 256;
const LIKELY: usize = 64;

/// What a text takes in JSON, which writes control characters and line breaks as six.
pub(super) fn of_text(text: &str) -> usize {
    let escaped = text.bytes().map(|byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 1,
        0..0x20 => 5,
        _ => 0,
    });
    let line_breaks = json::line_breaks(text);
    let line_breaks = line_breaks.map(|(_, found)| found.escape.len() - found.length);
    text.len() + escaped.sum::<usize>() + line_breaks.sum::<usize>()
}

/// What the log probabilities of so many tokens take, each with so many of the likeliest.
pub(super) fn of_logprobs(tokens: usize, top: usize) -> usize {
    tokens.saturating_mul(LOGPROB + top.saturating_mul(LIKELY))
}

/// What tokens take with their log probabilities.
pub(super) fn of_tokens(tokens: &TokenBatch) -> usize {
    let logprobs = tokens.iter().filter_map(|token| token.logprobs);
    let of_logprobs = logprobs.map(|logprobs| of_logprobs(1, logprobs.top.len()));
    of_text(tokens.text()) + of_logprobs.sum::<usize>()
}

/// Refuses an answer of which so much is repeated prompts.
///
/// # Errors
/// When that is too much.
pub(super) fn check_echo(size: usize) -> Result<(), Error> {
    if size <= LIMIT {
        return Ok(());
    }
    let message = "The answer would be too long: each choice repeats the prompt, with logprobs those of \
                   each of its tokens. Ask for fewer choices, fewer logprobs or a shorter prompt.";
    Err(Error::invalid_value("echo", message))
}

/// Refuses an answer in one piece that has grown to this size.
///
/// # Errors
/// When that is too much.
pub(super) fn check_piece(size: usize) -> Result<(), Error> {
    if size <= LIMIT {
        return Ok(());
    }
    let message = format!(
        "The answer has grown past {} MiB, the most that is sent in one piece. Ask for stream: true, or \
         for fewer tokens, choices or logprobs.",
        LIMIT / 1024 / 1024
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
            assert_eq!(of_text(text), json.len() - 2, "{text:?}");
        }
    }
}
