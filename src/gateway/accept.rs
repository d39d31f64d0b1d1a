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

/// What an entry of `Accept` asks for, the best first where the client has no preference of its own.
const MEANINGS: [(&str, Option<StreamFormat>); 7] = [
    ("application/x-ndjson", Some(StreamFormat::Ndjson)),
    ("application/jsonl", Some(StreamFormat::Ndjson)),
    ("text/event-stream", Some(StreamFormat::Sse)),
    // What OpenAI's clients send, which read server-sent events only.
    ("application/json", Some(StreamFormat::Sse)),
    ("text/*", Some(StreamFormat::Sse)),
    ("application/*", None),
    ("*/*", None),
];

/// The form for these headers; `default` where the client takes anything.
///
/// # Errors
/// When the client takes no form there is.
pub(super) fn negotiate(headers: &HeaderMap, default: StreamFormat) -> Result<StreamFormat, Error> {
    let mut entries = Vec::new();
    for value in headers.get_all(ACCEPT) {
        let value = value.to_str().map_err(|_| not_acceptable())?;
        entries.extend(value.split(',').filter_map(parse));
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
    let mut best: Option<(u16, StreamFormat)> = None;
    for (name, meaning) in MEANINGS {
        let Some(quality) = quality_of(name).filter(|quality| *quality > 0) else {
            continue;
        };
        let format = meaning.unwrap_or_else(|| not_excluded(default, quality_of));
        if best.is_none_or(|(known, _)| quality > known) {
            best = Some((quality, format));
        }
    }
    best.map(|(_, format)| format).ok_or_else(not_acceptable)
}

/// What a wildcard stands for: the default, unless the client has excluded just that.
fn not_excluded(default: StreamFormat, quality_of: impl Fn(&str) -> Option<u16>) -> StreamFormat {
    let (name, other) = match default {
        StreamFormat::Ndjson => ("application/x-ndjson", StreamFormat::Sse),
        StreamFormat::Sse => ("text/event-stream", StreamFormat::Ndjson),
    };
    if quality_of(name) == Some(0) {
        other
    } else {
        default
    }
}

struct Entry {
    name: String,
    /// In thousandths.
    quality: u16,
}

/// One entry; `None` for an empty one. A quality that is none counts as 1, as for every other
/// parameter that we do not know.
fn parse(entry: &str) -> Option<Entry> {
    let mut parts = entry.split(';').map(str::trim);
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
    fn each_media_type_has_its_form() {
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
    fn no_preference_is_the_default() {
        assert_eq!(form("*/*"), Some(StreamFormat::Ndjson));
        assert_eq!(form(""), Some(StreamFormat::Ndjson));
        assert_eq!(
            negotiate(&HeaderMap::new(), StreamFormat::Sse).ok(),
            Some(StreamFormat::Sse)
        );
    }

    #[test]
    fn quality_comes_before_our_order_and_our_order_breaks_ties() {
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
    fn what_is_excluded_is_not_sent() {
        assert_eq!(
            form("application/x-ndjson;q=0, */*"),
            Some(StreamFormat::Sse)
        );
        assert_eq!(form("text/html"), None);
        assert_eq!(form("application/x-ndjson;q=0"), None);
    }
}
