//! The deadline of a request: the client's timeout, in `x-request-timeout` (HTTP) or `grpc-timeout` (gRPC), or the
//! server's default.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use tokio::time::{Instant, timeout_at};

use super::response;
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};
use crate::request::MAX_TIMEOUT;
use crate::telemetry::{Api, RouteKind};

const HTTP_TIMEOUT: &str = "x-request-timeout";
const GRPC_TIMEOUT: &str = "grpc-timeout";

/// Extra time for a completion to report that its deadline has passed. The engine's own error says what the request
/// was waiting for.
const COMPLETION_GRACE: Duration = Duration::from_secs(2);

/// Rejects a request whose id or timeout is invalid. Ends a request that is not answered before its deadline. A
/// stream that has started checks its own deadline.
pub(super) async fn enforce_deadline(
    context: &RequestContext,
    handled: impl Future<Output = Response>,
) -> Response {
    let api = context.api();
    if let Err(error) = context.check() {
        return response::error_response(api, error);
    }
    let deadline = match context.route().kind {
        RouteKind::Completion => context.deadline() + COMPLETION_GRACE,
        RouteKind::Unary | RouteKind::Admin => context.deadline(),
        RouteKind::Probe | RouteKind::Unmatched => return handled.await,
    };
    let in_time = timeout_at(deadline, handled).await;
    in_time.unwrap_or_else(|_| {
        let message = "The request's deadline passed.";
        response::error_response(api, Error::new(ErrorKind::DeadlineExceeded, message))
    })
}

/// Returns the deadline for a request with this timeout that arrives now.
pub(super) fn deadline_after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(MAX_TIMEOUT)
}

/// Returns the timeout that the client sent, if there is one.
pub(super) fn client_timeout(api: Api, headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let (name, parse, message): (_, fn(&str) -> Option<Duration>, _) = match api {
        Api::Http => (
            HTTP_TIMEOUT,
            parse_seconds,
            "x-request-timeout must be a number of seconds above 0.",
        ),
        Api::Grpc => (
            GRPC_TIMEOUT,
            parse_grpc_timeout,
            "grpc-timeout must be 1 to 8 digits followed by one of the units H, M, S, m, u, n.",
        ),
    };
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        let message = format!("{name} must not be sent more than once.");
        return Err(Error::invalid_value(name, message));
    }
    let text = HeaderValue::to_str(value).ok();
    let timeout = text.and_then(parse);
    timeout
        .map(Some)
        .ok_or_else(|| Error::invalid_value(name, message))
}

/// Parses a positive number of seconds.
fn parse_seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    let seconds = Some(seconds).filter(|seconds| *seconds > 0.0)?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Parses the `grpc-timeout` header: 1 to 8 digits and a unit.
fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3_600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grpc_timeout_unit_is_parsed() {
        let seconds = |text| parse_grpc_timeout(text).map(|timeout| timeout.as_secs_f64());
        assert_eq!(seconds("2H"), Some(7_200.0));
        assert_eq!(seconds("2M"), Some(120.0));
        assert_eq!(seconds("2S"), Some(2.0));
        assert_eq!(seconds("2m"), Some(0.002));
        assert_eq!(seconds("2u"), Some(0.000_002));
        assert_eq!(seconds("2n"), Some(0.000_000_002));
    }

    #[test]
    fn an_invalid_grpc_timeout_is_rejected() {
        for text in [
            "",
            "S",
            "1",
            "1s",
            "-1S",
            "+1S",
            "1.5S",
            "123456789S",
            "1Sé",
        ] {
            assert_eq!(parse_grpc_timeout(text), None, "{text}");
        }
    }

    #[test]
    fn a_huge_timeout_is_clamped_to_ten_years() {
        let now = Instant::now();
        assert!(deadline_after(Duration::MAX) <= now + MAX_TIMEOUT + Duration::from_secs(60));
    }

    #[test]
    fn an_http_timeout_is_a_positive_number_of_seconds() {
        assert_eq!(parse_seconds("0.25"), Some(Duration::from_millis(250)));
        for text in ["", "0", "-1", "1s", "NaN", "1e400"] {
            assert_eq!(parse_seconds(text), None, "{text}");
        }
    }
}
