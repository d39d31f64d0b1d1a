//! The context that all steps of fetching one model share: the model, the access to the Hub and the progress callback.
//! It also builds the errors that name them.

use std::io;

use http::StatusCode;

use super::client::HubClient;
use super::error::HubError;
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

    /// Returns the error for an unsuccessful HTTP status. `what` names the requested repository or file.
    pub(super) fn status_error(&self, status: StatusCode, what: String) -> HubError {
        let (model, endpoint) = (self.model.to_string(), self.endpoint());
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => HubError::Denied {
                model,
                repo: self.model.repo().to_owned(),
                endpoint,
                status: status.as_u16(),
                token_hint: match self.options.token {
                    Some(_) => " (the token that was sent may not)",
                    None => " (no token was sent)",
                },
            },
            StatusCode::NOT_FOUND => HubError::NotFound {
                model,
                endpoint,
                what,
            },
            _ => HubError::Status {
                model,
                endpoint,
                status: status.as_u16(),
            },
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
