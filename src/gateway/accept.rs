//! Content negotiation: the stream format that the `Accept` header selects.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

use crate::error::{Error, ErrorKind};

/// Format of a streamed response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamFormat {
    /// Newline-delimited JSON: one object per line.
    Ndjson,
    /// Server-sent events, which OpenAI's clients expect.
    Sse,
}

/// Media types of each format. If the client accepts several with the same quality value, the first in this list is
/// used.
const NAMED_TYPES: [(&str, StreamFormat); 4] = [
    ("application/x-ndjson", StreamFormat::Ndjson),
    ("application/jsonl", StreamFormat::Ndjson),
    ("text/event-stream", StreamFormat::Sse),
    // OpenAI's clients send this type, although they read only server-sent events.
    ("application/json", StreamFormat::Sse),
];

impl StreamFormat {
    /// Returns the media type of this format, followed by the media ranges that contain it, the most specific first.
    fn matching_ranges(self) -> [&'static str; 3] {
        match self {
            Self::Ndjson => ["application/x-ndjson", "application/*", "*/*"],
            Self::Sse => ["text/event-stream", "text/*", "*/*"],
        }
    }
}

/// Selects the format that the `Accept` headers prefer, or `default` if they have no preference. The most specific
/// matching range sets the quality of a media type (RFC 9110, section 12.5.1).
///
/// # Errors
/// The client accepts neither format.
pub(super) fn negotiate(headers: &HeaderMap, default: StreamFormat) -> Result<StreamFormat, Error> {
    let mut accepted = Vec::new();
    for value in headers.get_all(ACCEPT) {
        let value = value.to_str().map_err(|_| not_acceptable())?;
        accepted.extend(split(value, ',').filter_map(MediaRange::parse));
    }
    if accepted.is_empty() {
        return Ok(default);
    }
    let quality_of = |name: &str| {
        let range = accepted.iter().find(|range| range.name == name);
        range.map(|range| range.quality)
    };
    let named = NAMED_TYPES.map(|(name, format)| (quality_of(name), format));
    // The default may occur twice. That has no effect, because only a higher quality replaces a candidate.
    let by_range = [default, StreamFormat::Ndjson, StreamFormat::Sse].map(|format| {
        let quality = format.matching_ranges().into_iter().find_map(quality_of);
        (quality, format)
    });
    let (mut best, mut best_quality) = (None, 0.0);
    for (quality, format) in named.into_iter().chain(by_range) {
        if let Some(quality) = quality.filter(|quality| *quality > best_quality) {
            (best, best_quality) = (Some(format), quality);
        }
    }
    best.ok_or_else(not_acceptable)
}

/// One media range of an `Accept` header.
struct MediaRange {
    name: String,
    /// Quality value, 0 to 1.
    quality: f32,
}

impl MediaRange {
    /// Parses a media range. Returns `None` if it is empty. An invalid quality counts as 1.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = split(text, ';').map(str::trim);
        let name = parts.next().filter(|name| !name.is_empty())?;
        let quality = parts.find_map(|part| {
            let (key, value) = part.split_once('=')?;
            let is_quality = key.trim().eq_ignore_ascii_case("q");
            let quality: f32 = value.trim().parse().ok().filter(|_| is_quality)?;
            (0.0..=1.0).contains(&quality).then_some(quality)
        });
        Some(Self {
            name: name.to_ascii_lowercase(),
            quality: quality.unwrap_or(1.0),
        })
    }
}

/// Splits a header value at `separator`, except inside quoted strings.
fn split(value: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    value.split(move |character| {
        let escaped = std::mem::take(&mut is_escaped);
        match character {
            '"' if !escaped => is_quoted = !is_quoted,
            '\\' if is_quoted && !escaped => is_escaped = true,
            _ => {}
        }
        character == separator && !is_quoted
    })
}

fn not_acceptable() -> Error {
    Error::new(
        ErrorKind::NotAcceptable,
        "Accept must allow application/x-ndjson or text/event-stream, the formats of a stream.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiated(accept: &str) -> Option<StreamFormat> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        negotiate(&headers, StreamFormat::Ndjson).ok()
    }

    #[test]
    fn each_media_type_selects_its_stream_format() {
        assert_eq!(
            negotiated("application/x-ndjson"),
            Some(StreamFormat::Ndjson)
        );
        assert_eq!(negotiated("application/jsonl"), Some(StreamFormat::Ndjson));
        assert_eq!(negotiated("text/event-stream"), Some(StreamFormat::Sse));
        assert_eq!(negotiated("application/json"), Some(StreamFormat::Sse));
        assert_eq!(
            negotiated("Application/JSON; charset=utf-8"),
            Some(StreamFormat::Sse)
        );
    }

    #[test]
    fn no_preference_selects_the_default() {
        assert_eq!(negotiated("*/*"), Some(StreamFormat::Ndjson));
        assert_eq!(negotiated(""), Some(StreamFormat::Ndjson));
        assert_eq!(
            negotiate(&HeaderMap::new(), StreamFormat::Sse).ok(),
            Some(StreamFormat::Sse)
        );
    }

    #[test]
    fn quality_comes_first_and_server_preference_breaks_ties() {
        let sse_first = "application/x-ndjson;q=0.5, text/event-stream;q=0.9";
        assert_eq!(negotiated(sse_first), Some(StreamFormat::Sse));
        let tie = "text/event-stream, application/x-ndjson";
        assert_eq!(negotiated(tie), Some(StreamFormat::Ndjson));
        assert_eq!(negotiated("*/*, application/json"), Some(StreamFormat::Sse));
        assert_eq!(
            negotiated("application/json;q=0.1, */*;q=0.8"),
            Some(StreamFormat::Ndjson)
        );
    }

    #[test]
    fn the_most_specific_media_range_sets_the_quality() {
        for (accept, expected) in [
            ("application/x-ndjson;q=0.1, */*", StreamFormat::Sse),
            ("*/*, application/x-ndjson;q=0.1", StreamFormat::Sse),
            ("application/*;q=0.2, */*;q=0.1", StreamFormat::Ndjson),
            ("application/*;q=0.1, */*;q=0.2", StreamFormat::Sse),
            ("text/*;q=0.3, application/*;q=0.5", StreamFormat::Ndjson),
            ("text/event-stream;q=0.1, text/*", StreamFormat::Sse),
        ] {
            assert_eq!(negotiated(accept), Some(expected), "{accept}");
        }
    }

    #[test]
    fn a_separator_inside_quotes_is_not_a_separator() {
        for accept in [
            "application/x-ndjson;profile=\"a,b\";q=0.1, text/event-stream;q=0.5",
            "application/x-ndjson;profile=\"a;q=1\\\"b\";q=0.1, text/event-stream;q=0.5",
        ] {
            assert_eq!(negotiated(accept), Some(StreamFormat::Sse), "{accept}");
        }
    }

    #[test]
    fn a_media_type_with_quality_zero_is_not_used() {
        assert_eq!(
            negotiated("application/x-ndjson;q=0, */*"),
            Some(StreamFormat::Sse)
        );
        let all_but_text = "text/*;q=0, */*";
        assert_eq!(negotiated(all_but_text), Some(StreamFormat::Ndjson));
        assert_eq!(
            negotiated("application/*;q=0, */*"),
            Some(StreamFormat::Sse)
        );
        assert_eq!(negotiated("text/html"), None);
        assert_eq!(negotiated("application/x-ndjson;q=0"), None);
    }
}
