//! The context that all steps of fetching one model share: the model, the access to the Hub and the progress callback.
//! It also builds the errors that name them.

use std::io::{self, ErrorKind};

use http::StatusCode;

use super::client::{ClientError, HubClient};
use super::error::{Failure, HubError};
use super::options::HubOptions;
use super::reference::HubModel;

/// Progress of the download of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownloadProgress<'a> {
    /// Path of the file in its repository.
    pub file: &'a str,
    /// Number of bytes that are in the cache.
    pub received: u64,
    /// Size of the file in bytes.
    pub size: u64,
}

/// The parameters of a fetch.
pub(super) struct FetchContext<'a> {
    pub(super) model: &'a HubModel,
    pub(super) options: &'a HubOptions,
    pub(super) client: HubClient,
    pub(super) progress: &'a (dyn Fn(DownloadProgress<'_>) + Sync),
}

impl FetchContext<'_> {
    pub(super) fn endpoint(&self) -> String {
        self.options.endpoint.as_str().to_owned()
    }

    /// Returns the error for an unsuccessful HTTP status. `resource` names the requested repository or file.
    pub(super) fn status_error(&self, status: StatusCode, resource: String) -> HubError {
        let (model, endpoint) = (self.model.to_string(), self.endpoint());
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => HubError::Denied {
                model,
                repo: self.model.repo().to_owned(),
                endpoint,
                status: status.as_u16(),
                token_hint: match self.options.token {
                    Some(_) => " (the token that was sent has no access)",
                    None => " (no token was sent)",
                },
            },
            StatusCode::NOT_FOUND => HubError::NotFound {
                model,
                endpoint,
                resource,
            },
            _ => HubError::Status {
                model,
                endpoint,
                status: status.as_u16(),
            },
        }
    }

    /// Returns the failure of a request for a file.
    pub(super) fn request_failure(&self, error: &ClientError) -> Failure {
        match error {
            ClientError::Connect { .. } | ClientError::Broken { .. } => {
                Failure::Temporary(error.to_string())
            }
            ClientError::Redirect { .. } | ClientError::TooLong { .. } => {
                Failure::Final(HubError::InvalidResponse {
                    model: self.model.to_string(),
                    endpoint: self.endpoint(),
                    problem: error.to_string(),
                })
            }
        }
    }

    /// Returns the error for bytes of `file` that could not be written.
    pub(super) fn write_error(&self, file: &str, source: io::Error) -> HubError {
        let is_full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded].contains(&source.kind());
        match is_full {
            true => HubError::DiskFull {
                model: self.model.to_string(),
                file: file.to_owned(),
                cache: self.options.cache.clone(),
                source,
            },
            false => self.cache_error(source),
        }
    }

    pub(super) fn cache_error(&self, source: io::Error) -> HubError {
        HubError::Cache {
            model: self.model.to_string(),
            cache: self.options.cache.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::hub::Endpoint;

    #[test]
    fn a_full_disk_or_an_exceeded_quota_is_an_error_without_an_invented_number() {
        let endpoint = Endpoint::parse("http://hub.example").expect("a valid address");
        let options = HubOptions::new(endpoint, PathBuf::from("/cache"));
        let context = FetchContext {
            model: &HubModel::file("a/b", "m.gguf"),
            client: HubClient::new(&options),
            options: &options,
            progress: &|_| (),
        };
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
            let error = context.write_error("m.gguf", kind.into()).to_string();
            let expected =
                format!("hf:a/b:m.gguf: m.gguf does not fit into /cache: {kind}; free some space");
            assert!(error.starts_with(&expected), "{error}");
            assert!(!error.contains(|it: char| it.is_ascii_digit()), "{error}");
        }
        let error = context.write_error("m.gguf", ErrorKind::PermissionDenied.into());
        assert!(matches!(error, HubError::Cache { .. }), "{error}");
    }
}
