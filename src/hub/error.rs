//! Errors of fetching a model from the Hub.

use std::io;
use std::path::PathBuf;

use indicatif::DecimalBytes;

use super::select::SelectError;

/// Reason why the files of a model are not available. `model` is its name without `hf:`.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The Hub is not available, and the cache does not have the model.
    #[error(
        "hf:{model} is not in the cache ({}), and the Hub is not available: {reason}; check the network, HF_ENDPOINT \
         and HTTPS_PROXY, or download the file on another machine and set --model FILE", cache.display()
    )]
    Unreachable {
        /// Name of the model.
        model: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// Description of the failure.
        reason: String,
    },
    /// Downloads are switched off, and the cache does not have the model.
    #[error(
        "hf:{model} is not in the cache ({}), and HF_HUB_OFFLINE forbids downloads; unset it, or download the file \
         on another machine and set --model FILE{hint}", cache.display()
    )]
    Offline {
        /// Name of the model.
        model: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// End of the message: the cached models of the repository. Empty if there are none.
        hint: String,
    },
    /// The repository does not have the model, or has several that match.
    #[error("hf:{model}: {reason}")]
    Select {
        /// Name of the model.
        model: String,
        /// Reason.
        reason: SelectError,
    },
    /// The Hub denies access to the repository.
    #[error(
        "hf:{model}: {endpoint} denies access ({status}). Either there is no such repository, or it is private or gated: \
         check the name, ask for access at {endpoint}/{repo}, and set HF_TOKEN to a token that may read it{token_hint}"
    )]
    Denied {
        /// Name of the model.
        model: String,
        /// Name of the repository.
        repo: String,
        /// Address of the Hub.
        endpoint: String,
        /// HTTP status.
        status: u16,
        /// End of the message: it says whether a token was sent.
        token_hint: &'static str,
    },
    /// The Hub does not have the repository or the file.
    #[error("hf:{model}: {endpoint} has no {resource}; check the name")]
    NotFound {
        /// Name of the model.
        model: String,
        /// Address of the Hub.
        endpoint: String,
        /// The repository or file.
        resource: String,
    },
    /// The Hub answers with another unsuccessful status.
    #[error("hf:{model}: {endpoint} answers with the HTTP status {status}; try again later")]
    Status {
        /// Name of the model.
        model: String,
        /// Address of the Hub.
        endpoint: String,
        /// HTTP status.
        status: u16,
    },
    /// The response is not one that the Hub returns, or redirects to an address that must not be followed.
    #[error("hf:{model}: the response of {endpoint} is not valid: {problem}; check HF_ENDPOINT")]
    InvalidResponse {
        /// Name of the model.
        model: String,
        /// Address of the Hub.
        endpoint: String,
        /// Description of the problem.
        problem: String,
    },
    /// The Hub has no hash of the file, so the download cannot be checked.
    #[error(
        "hf:{model}: the Hub has no SHA-256 of {file}, so the download cannot be checked; download the file yourself and \
         set --model FILE"
    )]
    NoHash {
        /// Name of the model.
        model: String,
        /// The file.
        file: String,
    },
    /// The download broke several times in a row without progress.
    #[error(
        "hf:{model}: the download of {file} stopped at {} of {}: {reason}; start again to continue it",
        DecimalBytes(*.received), DecimalBytes(*.size)
    )]
    Interrupted {
        /// Name of the model.
        model: String,
        /// The file.
        file: String,
        /// Number of bytes that are in the cache.
        received: u64,
        /// Size of the file in bytes.
        size: u64,
        /// Description of the last failure.
        reason: String,
    },
    /// The size of the file is not the one that the Hub lists.
    #[error(
        "hf:{model}: {file} must have {expected} bytes, but the server sends {found}; a proxy or a mirror may be at fault: \
         check HF_ENDPOINT and HTTPS_PROXY, and start again"
    )]
    WrongSize {
        /// Name of the model.
        model: String,
        /// The file.
        file: String,
        /// Size that the Hub lists, in bytes.
        expected: u64,
        /// Description of the size that was found.
        found: String,
    },
    /// The contents of the file are not those that the Hub lists.
    #[error(
        "hf:{model}: {file} is damaged: its SHA-256 must be {expected} (got {found}). The download was deleted; start \
         again. If that does not help, a proxy or a mirror changes the file: check HF_ENDPOINT and HTTPS_PROXY"
    )]
    WrongHash {
        /// Name of the model.
        model: String,
        /// The file.
        file: String,
        /// SHA-256 that the Hub lists.
        expected: String,
        /// SHA-256 of the download.
        found: String,
    },
    /// The disk has no room for the files that are still to be downloaded.
    #[error(
        "hf:{model}: the download needs {} of free space, but {} has only {}; free some space, or set HF_HUB_CACHE to \
         a folder on another disk", DecimalBytes(*.needed), cache.display(), DecimalBytes(*.free)
    )]
    NoSpace {
        /// Name of the model.
        model: String,
        /// Number of bytes that must be free: those still to be downloaded, and a reserve.
        needed: u64,
        /// Number of bytes that are free.
        free: u64,
        /// Folder of the cache.
        cache: PathBuf,
    },
    /// The disk became full during the download, or the user's quota is used up.
    #[error(
        "hf:{model}: {file} does not fit into {}: {source}; free some space, or set HF_HUB_CACHE to a folder on another \
         disk, and start again", cache.display()
    )]
    DiskFull {
        /// Name of the model.
        model: String,
        /// The file.
        file: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The cache cannot be written.
    #[error(
        "hf:{model}: the cache {} cannot be written: {source}; set HF_HUB_CACHE to a writable folder", cache.display()
    )]
    Cache {
        /// Name of the model.
        model: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// A failure of one request. It says whether another attempt may succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Another attempt may succeed.
    #[error("{0}")]
    Temporary(String),
    /// Another attempt would fail in the same way.
    #[error(transparent)]
    Final(#[from] HubError),
}
