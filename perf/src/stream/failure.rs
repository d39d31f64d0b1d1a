//! Errors that a server reports in a record, in the body of a rejection, or as a gRPC status.

use std::fmt;

use serde_json::Value;
use tokenway::error::Error;
use tonic::Status;

/// Error with which a server ends a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) code: Option<String>,
}

impl Failure {
    /// Returns the failure in an error object. Servers other than Tokenway may send any JSON value.
    pub(super) fn from_error_object(error: &Value) -> Self {
        let message = error.get("message").unwrap_or(error);
        let text = message.as_str().map(str::to_owned);
        Self {
            message: text.unwrap_or_else(|| message.to_string()),
            code: error["code"].as_str().map(str::to_owned),
        }
    }

    pub(super) fn of_body(body: &[u8]) -> Option<Self> {
        let parsed: Value = serde_json::from_slice(body).ok()?;
        parsed.get("error").map(Self::from_error_object)
    }

    pub(super) fn of_status(status: &Status) -> Self {
        Self {
            message: format!("{:?}: {}", status.code(), status.message()),
            code: Some(Error::from(status).kind.mapping().code.to_owned()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.code {
            None => f.write_str(&self.message),
            Some(code) => write!(f, "{} ({code})", self.message),
        }
    }
}
