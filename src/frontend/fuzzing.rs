//! Fuzz target of the request headers that both APIs read.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::{authentication, deadline, request_id};
use crate::request::{MAX_REQUEST_ID_BYTES, MAX_TIMEOUT};
use crate::telemetry::Api;

/// Input: `x-request-id`, `x-request-timeout`, `grpc-timeout`, `authorization` and `x-api-key`, one per line. An
/// accepted id can be a header and a word of a log line, an accepted timeout yields a deadline, and a key is the last
/// part of its header.
pub(crate) fn request_headers(data: &[u8]) {
    let names = [
        "x-request-id",
        "x-request-timeout",
        "grpc-timeout",
        "authorization",
        "x-api-key",
    ];
    let mut headers = HeaderMap::new();
    for (name, value) in names.into_iter().zip(data.split(|byte| *byte == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    match request_id::request_id(&headers) {
        Ok(id) => {
            assert!((1..=MAX_REQUEST_ID_BYTES).contains(&id.0.len()));
            assert!(id.0.bytes().all(|byte| byte.is_ascii_graphic()));
        }
        Err(error) => assert!(error.kind.mapping().http.is_client_error()),
    }
    if let Ok(secret) = authentication::presented_secret(&headers) {
        let value = headers.get("authorization").or(headers.get("x-api-key"));
        let value = value.map_or(&[][..], |value| value.as_bytes().trim_ascii_end());
        assert!(value.ends_with(secret.trim_ascii_end()));
    }
    for api in [Api::Http, Api::Grpc] {
        match deadline::client_timeout(api, &headers) {
            Ok(Some(timeout)) => {
                let latest = Instant::now() + MAX_TIMEOUT + Duration::from_secs(60);
                assert!(deadline::deadline_after(timeout) < latest);
            }
            Ok(None) => {}
            Err(error) => assert!(error.kind.mapping().http.is_client_error()),
        }
    }
}
