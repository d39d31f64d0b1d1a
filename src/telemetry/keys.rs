//! Metrics of authentication and of API keys. The label `key` is the name of a key in the keys file.

use metrics::{Key, Label, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::{Api, RECORDER_METADATA, Telemetry, TokenUsage};
use crate::keys::KeyName;

const AUTHENTICATION_FAILURES: &str = "tokenway_authentication_failures_total";
const KEY_REQUESTS: &str = "tokenway_key_requests_total";
const KEY_TOKENS: &str = "tokenway_key_tokens_total";

/// Reason why the key of a request was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AuthenticationFailure {
    /// The request has no key.
    MissingKey,
    /// The key is unknown, revoked, expired or malformed.
    InvalidKey,
    /// The key lacks the scope that the route needs.
    Scope,
}

impl AuthenticationFailure {
    fn label(self) -> &'static str {
        match self {
            Self::MissingKey => "missing_key",
            Self::InvalidKey => "invalid_key",
            Self::Scope => "scope",
        }
    }
}

impl Telemetry {
    /// Counts a request whose key was not accepted.
    pub(crate) fn count_authentication_failure(&self, api: Api, failure: AuthenticationFailure) {
        let labels = [("api", api.label()), ("reason", failure.label())];
        self.labelled_counter(AUTHENTICATION_FAILURES, &labels)
            .increment(1);
    }

    /// Counts a request of a key that has ended, and its tokens.
    pub(super) fn count_key_request(
        &self,
        key: &KeyName,
        outcome: &'static str,
        usage: Option<TokenUsage>,
    ) {
        self.count_for_key(KEY_REQUESTS, key, ("outcome", outcome), 1);
        if let Some(usage) = usage {
            self.count_for_key(KEY_TOKENS, key, ("kind", "prompt"), usage.prompt);
            self.count_for_key(KEY_TOKENS, key, ("kind", "completion"), usage.completion);
        }
    }

    fn count_for_key(
        &self,
        name: &'static str,
        key: &KeyName,
        (label, value): (&'static str, &'static str),
        count: u64,
    ) {
        let key = SharedString::from(key.as_str().to_owned());
        let labels = vec![
            Label::new("key", key),
            Label::from_static_parts(label, value),
        ];
        let key = Key::from_parts(name, labels);
        let counter = self.recorder.register_counter(&key, &RECORDER_METADATA);
        counter.increment(count);
    }
}

/// Describes the metrics of keys.
pub(super) fn describe(recorder: &PrometheusRecorder) {
    for (name, text) in [
        (
            AUTHENTICATION_FAILURES,
            "Requests whose API key was not accepted, by API and reason: 'missing_key', 'invalid_key' (unknown, revoked, \
             expired or malformed) or 'scope' (the key lacks the scope that the route needs).",
        ),
        (
            KEY_REQUESTS,
            "Requests of API keys that have ended, by key and outcome: 'ok' or an error code.",
        ),
        (
            KEY_TOKENS,
            "Tokens of the requests of API keys, by key and kind: 'prompt' or 'completion'.",
        ),
    ] {
        recorder.describe_counter(name.into(), Some(Unit::Count), SharedString::from(text));
    }
}
