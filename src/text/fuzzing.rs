//! Fuzz target of the text of a completion: bytes of a model, and stop strings of a client.

use std::sync::Arc;

use super::stop::{StopMatcher, StopStatus, StopStrings};
use super::utf8::Utf8Assembler;

/// One byte with the length of the tokens, one with the number of stop strings, the stop strings, each with its length
/// before it, and the bytes of all tokens. The text must equal that of a decoder and a search that see all tokens at
/// once. It ends at the match that ends first; of several such matches, at the one that starts first.
/// Returns the text.
pub(crate) fn text(data: &[u8]) -> Option<String> {
    let ([token_bytes, stop_count], mut rest) = data.split_first_chunk()?;
    let mut stops = Vec::new();
    for _ in 0..stop_count % 5 {
        let (length, after) = rest.split_first()?;
        let (stop, after) = after.split_at_checked(usize::from(*length % 8))?;
        stops.extend(std::str::from_utf8(stop).ok().map(str::to_owned));
        rest = after;
    }
    stops.retain(|stop| !stop.is_empty());
    let include_match = token_bytes & 0x80 != 0;
    let whole = String::from_utf8_lossy(rest);
    let found = stops.iter().filter_map(|stop| {
        let start = whole.find(stop)?;
        Some((start, start + stop.len()))
    });
    let found = found.min_by_key(|(start, end)| (*end, *start));
    let tokens = rest.chunks(usize::from(token_bytes & 0x7f).max(1));
    let (text, has_matched) = matched(&stops, include_match, tokens);
    assert_eq!(has_matched, found.is_some());
    let end = match found {
        Some((_, end)) if include_match => end,
        Some((start, _)) => start,
        None => whole.len(),
    };
    assert_eq!(text, whole[..end], "{whole:?} with {stops:?}");
    Some(text)
}

fn matched<'a>(
    stops: &[String],
    include_match: bool,
    tokens: impl Iterator<Item = &'a [u8]>,
) -> (String, bool) {
    let stops = StopStrings::new(stops).with_included_match(include_match);
    let mut matcher = StopMatcher::new(Arc::new(stops));
    let (mut utf8, mut text) = (Utf8Assembler::default(), String::new());
    let mut next_index = 0;
    let mut release = |index: usize, released: &str| {
        assert_eq!(index, next_index, "tokens are released in order");
        next_index += 1;
        text.push_str(released);
    };
    let mut last_index = 0;
    for (index, bytes) in tokens.enumerate() {
        let mut decoded = String::new();
        utf8.push(bytes, &mut decoded);
        if matcher.push(index, &decoded, &mut release) == StopStatus::Matched {
            return (text, true);
        }
        last_index = index + 1;
    }
    let mut decoded = String::new();
    utf8.finish(&mut decoded);
    if matcher.push(last_index, &decoded, &mut release) == StopStatus::Matched {
        return (text, true);
    }
    matcher.finish(&mut release);
    (text, false)
}
