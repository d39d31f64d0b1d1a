//! Layer that applies the limits of API keys, and reports them in the headers of the response.

use std::fmt::Write;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;

use crate::context::RequestContext;
use crate::error::Error;
use crate::keys::RateStatus;
use crate::telemetry::RouteKind;

/// The headers of OpenAI's API with the limit, the remaining amount, and the time until the whole limit is available
/// again.
const REQUEST_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKEN_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Counts a request toward the limits of its key. The limits do not apply to probes and to routes that control the
/// server.
pub(super) fn start_limited(context: &RequestContext) -> Result<(), Error> {
    match context.route().kind {
        RouteKind::Probe | RouteKind::Admin => Ok(()),
        RouteKind::Completion | RouteKind::Unary | RouteKind::Unmatched => context.start_limited(),
    }
}

/// Adds the state of the key's limits to a response. A key without limits gets no headers.
pub(super) fn add_headers(context: &RequestContext, response: &mut Response) {
    let [requests, tokens] = context.rate_status();
    for (names, status) in [(REQUEST_HEADERS, requests), (TOKEN_HEADERS, tokens)] {
        let Some(RateStatus {
            limit,
            remaining,
            reset,
        }) = status
        else {
            continue;
        };
        let values = [limit.to_string(), remaining.to_string(), format_time(reset)];
        for (name, value) in names.into_iter().zip(values) {
            let value = HeaderValue::from_str(&value).expect("the value is ASCII");
            response.headers_mut().insert(name, value);
        }
    }
}

/// Formats a time as OpenAI's API does: `6m0s`, `1.5s` or `20ms`.
fn format_time(time: Duration) -> String {
    let millis = time.as_millis();
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    if millis < 1_000 {
        return format!("{millis}ms");
    }
    let mut text = String::new();
    if minutes > 0 {
        let _ = write!(text, "{minutes}m");
    }
    let _ = match rest % 1_000 {
        0 => write!(text, "{}s", rest / 1_000),
        millis => write!(text, "{}.{millis:03}s", rest / 1_000),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_format_of_openais_api() {
        for (millis, expected) in [
            (0, "0ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (1_050, "1.050s"),
            (60_000, "1m0s"),
            (361_500, "6m1.500s"),
        ] {
            assert_eq!(format_time(Duration::from_millis(millis)), expected);
        }
    }
}
