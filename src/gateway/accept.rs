//! Which form a stream has, by what the client accepts.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

use crate::error::{Error, ErrorKind};

/// The form of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamFormat {
    /// One JSON object a line.
    Ndjson,
    /// Server-sent events, as OpenAI's own clients read them.
    Sse,
}

/// What asks for a form by its name, the best first where the client has no preference of its own.
const NAMES: [(&str, StreamFormat); 4] = [
    ("application/x-ndjson", StreamFormat::Ndjson),
    ("application/jsonl", StreamFormat::Ndjson),
    ("text/event-stream", StreamFormat::Sse),
    // What OpenAI's clients send, which read server-sent events only.
    ("application/json", StreamFormat::Sse),
];

impl StreamFormat {
    /// The type that a stream of this form is sent as, and the ranges that it is in, from the most specific.
    fn media_type(self) -> [&'static str; 3] {
        match self {
            Self::Ndjson => ["application/x-ndjson", "application/*", "*/*"],
            Self::Sse => ["text/event-stream", "text/*", "*/*"],
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Ndjson => Self::Sse,
            Self::Sse => Self::Ndjson,
        }
    }
}

/// The form for these headers; `default` where the client takes anything. The quality of a type is that of
/// the most specific range that it is in (RFC 9110, section 12.5.1).
///
/// # Errors
/// When the client takes no form there is.
pub(super) fn negotiate(headers: &HeaderMap, default: StreamFormat) -> Result<StreamFormat, Error> {
    let mut entries = Vec::new();
    for value in headers.get_all(ACCEPT) {
        let value = value.to_str().map_err(|_| not_acceptable())?;
        entries.extend(split(value, ',').filter_map(parse));
    }
    if entries.is_empty() {
        return Ok(default);
    }
    let quality_of = |name: &str| {
        entries
            .iter()
            .find(|entry| entry.name == name)
            .map(|entry| entry.quality)
    };
    let named = NAMES.map(|(name, format)| (quality_of(name), format));
    let by_a_range = [default, default.other()].map(|format| {
        let [name, ranges @ ..] = format.media_type();
        let quality = match quality_of(name) {
            Some(_) => None,
            None => ranges.into_iter().find_map(quality_of),
        };
        (quality, format)
    });
    let mut best: Option<(u16, StreamFormat)> = None;
    for (quality, format) in named.into_iter().chain(by_a_range) {
        let Some(quality) = quality.filter(|quality| *quality > 0) else {
            continue;
        };
        if best.is_none_or(|(known, _)| quality > known) {
            best = Some((quality, format));
        }
    }
    best.map(|(_, format)| format).ok_or_else(not_acceptable)
}

struct Entry {
    name: String,
    /// In thousandths.
    quality: u16,
}

/// The parts of a header's value, but for separators within quotes.
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

/// One entry; `None` for an empty one. A quality that is none counts as 1, as for every other
/// parameter that we do not know.
fn parse(entry: &str) -> Option<Entry> {
    let mut parts = split(entry, ';').map(str::trim);
    let name = parts
        .next()
        .filter(|name| !name.is_empty())?
        .to_ascii_lowercase();
    let quality = parts.find_map(|part| {
        let (key, value) = part.split_once('=')?;
        key.trim()
            .eq_ignore_ascii_case("q")
            .then(|| thousandths(value.trim()))
            .flatten()
    });
    Some(Entry {
        name,
        quality: quality.unwrap_or(1_000),
    })
}

/// A quality value: `0` to `1` with up to three decimals.
fn thousandths(text: &str) -> Option<u16> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    if decimals.len() > 3 || !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let whole: u16 = whole.parse().ok()?;
    let decimals: u16 = format!("{decimals:0<3}").parse().ok()?;
    (whole * 1_000)
        .checked_add(decimals)
        .filter(|quality| *quality <= 1_000)
}

fn not_acceptable() -> Error {
    Error::new(
        ErrorKind::NotAcceptable,
        "A stream has one of the forms application/x-ndjson and text/event-stream; Accept names \
         neither.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &str) -> Option<StreamFormat> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        negotiate(&headers, StreamFormat::Ndjson).ok()
    }

    #[test]
    fn each_media_type_selects_its_stream_format() {
        assert_eq!(form("application/x-ndjson"), Some(StreamFormat::Ndjson));
        assert_eq!(form("application/jsonl"), Some(StreamFormat::Ndjson));
        assert_eq!(form("text/event-stream"), Some(StreamFormat::Sse));
        assert_eq!(form("application/json"), Some(StreamFormat::Sse));
        assert_eq!(
            form("Application/JSON; charset=utf-8"),
            Some(StreamFormat::Sse)
        );
    }

    #[test]
    fn no_preference_selects_the_default() {
        assert_eq!(form("*/*"), Some(StreamFormat::Ndjson));
        assert_eq!(form(""), Some(StreamFormat::Ndjson));
        assert_eq!(
            negotiate(&HeaderMap::new(), StreamFormat::Sse).ok(),
            Some(StreamFormat::Sse)
        );
    }

    #[test]
    fn quality_comes_first_and_server_preference_breaks_ties() {
        let sse_first = "application/x-ndjson;q=0.5, text/event-stream;q=0.9";
        assert_eq!(form(sse_first), Some(StreamFormat::Sse));
        let tie = "text/event-stream, application/x-ndjson";
        assert_eq!(form(tie), Some(StreamFormat::Ndjson));
        assert_eq!(form("*/*, application/json"), Some(StreamFormat::Sse));
        assert_eq!(
            form("application/json;q=0.1, */*;q=0.8"),
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
            assert_eq!(form(accept), Some(expected), "{accept}");
        }
    }

    #[test]
    fn a_separator_inside_quotes_is_not_a_separator() {
        for accept in [
            "application/x-ndjson;profile=\"a,b\";q=0.1, text/event-stream;q=0.5",
            "application/x-ndjson;profile=\"a;q=1\\\"b\";q=0.1, text/event-stream;q=0.5",
        ] {
            assert_eq!(form(accept), Some(StreamFormat::Sse), "{accept}");
        }
    }

    #[test]
    fn a_media_type_with_quality_zero_is_not_used() {
        assert_eq!(
            form("application/x-ndjson;q=0, */*"),
            Some(StreamFormat::Sse)
        );
        let but_for_text = "text/*;q=0, */*";
        assert_eq!(form(but_for_text), Some(StreamFormat::Ndjson));
        assert_eq!(form("application/*;q=0, */*"), Some(StreamFormat::Sse));
        assert_eq!(form("text/html"), None);
        assert_eq!(form("application/x-ndjson;q=0"), None);
    }
}
