//! Request metadata: the request id and the client's timeout.

use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};

use crate::error::Error;
use crate::request::RequestId;

const REQUEST_ID: &str = "x-request-id";
const TIMEOUT: &str = "grpc-timeout";

/// Maximum length of a request id that a client sends, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Adds the request id to the response metadata.
pub(crate) fn echo_request_id(metadata: &mut MetadataMap, id: &RequestId) {
    if let Ok(value) = MetadataValue::try_from(&*id.0) {
        metadata.insert(REQUEST_ID, value);
    }
}

/// Returns the request id of the client, or a random one if the client sent none.
pub(crate) fn request_id(metadata: &MetadataMap) -> Result<RequestId, Error> {
    let Some(value) = metadata.get(REQUEST_ID) else {
        return Ok(RequestId::random());
    };
    match value.to_str() {
        Ok(id) if !id.is_empty() && id.len() <= MAX_REQUEST_ID_BYTES => Ok(RequestId(id.into())),
        Ok(_) | Err(_) => Err(Error::invalid_value(
            REQUEST_ID,
            format!("x-request-id must have 1 to {MAX_REQUEST_ID_BYTES} visible ASCII characters."),
        )),
    }
}

/// Returns the timeout that the client set in `grpc-timeout`: 1 to 8 digits and a unit.
pub(crate) fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Error> {
    let Some(value) = metadata.get(TIMEOUT) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(parse_timeout);
    parsed.map(Some).ok_or_else(|| {
        Error::invalid_value(
            TIMEOUT,
            "grpc-timeout must be 1 to 8 digits followed by one of the units H, M, S, m, u, n.",
        )
    })
}

fn parse_timeout(text: &str) -> Option<Duration> {
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
    fn every_timeout_unit_is_parsed() {
        let seconds = |text| parse_timeout(text).map(|timeout| timeout.as_secs_f64());
        assert_eq!(seconds("2H"), Some(7_200.0));
        assert_eq!(seconds("2M"), Some(120.0));
        assert_eq!(seconds("2S"), Some(2.0));
        assert_eq!(seconds("2m"), Some(0.002));
        assert_eq!(seconds("2u"), Some(0.000_002));
        assert_eq!(seconds("2n"), Some(0.000_000_002));
    }

    #[test]
    fn an_invalid_timeout_is_rejected() {
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
            assert_eq!(parse_timeout(text), None, "{text}");
        }
    }
}
