//! Downloads the models of a server or worker before it starts, and shows the progress. A signal ends the program. The
//! next start continues the download.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::hub::{HubModel, HubOptions};
use crate::output::Output;

#[cfg(feature = "llama-cpp")]
mod display;

/// The file of each downloaded model; the first one of a split model.
pub type ModelFiles = BTreeMap<HubModel, PathBuf>;

/// Models to download, and access to the Hub.
pub struct Downloads {
    /// The models.
    pub models: Vec<PendingModel>,
    /// Access to the Hub.
    pub options: HubOptions,
}

/// A model to download.
pub struct PendingModel {
    /// The setting that names the model, for errors.
    pub setting: String,
    /// The model.
    pub model: HubModel,
}

/// Reason why a model was not downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// A model is not available.
    #[cfg(feature = "llama-cpp")]
    #[error("{setting} {source}")]
    Model {
        /// The setting that names the model.
        setting: String,
        /// Reason.
        source: crate::hub::HubError,
    },
    /// Signal handlers cannot be installed.
    #[error("cannot install signal handlers: {0}")]
    Signals(#[from] std::io::Error),
    /// This build runs no models from files.
    #[error("this build does not include llama; `make build` builds it with llama.cpp")]
    NotIncluded,
}

/// Downloads the models that are not in the cache, one after the other. Returns `None` if SIGTERM or Ctrl-C stops the
/// program.
///
/// `err` (standard error) receives a progress bar if it is a terminal. Otherwise the progress is logged.
///
/// # Errors
/// A model is not available.
#[cfg(feature = "llama-cpp")]
pub async fn download_until_signalled(
    downloads: &Downloads,
    err: &Output,
) -> Result<Option<ModelFiles>, DownloadError> {
    let mut signals = super::Signals::new()?;
    tokio::select! {
        files = download_all(downloads, err) => files.map(Some),
        () = signals.next() => {
            tracing::info!("stopped during a download; the next start continues it");
            Ok(None)
        }
    }
}

/// Fails. A build without llama.cpp does not call this function, because its settings reject models in files.
///
/// # Errors
/// Always.
#[cfg(not(feature = "llama-cpp"))]
pub async fn download_until_signalled(
    _downloads: &Downloads,
    _err: &Output,
) -> Result<Option<ModelFiles>, DownloadError> {
    Err(DownloadError::NotIncluded)
}

#[cfg(feature = "llama-cpp")]
async fn download_all(downloads: &Downloads, err: &Output) -> Result<ModelFiles, DownloadError> {
    let mut files = ModelFiles::new();
    for PendingModel { setting, model } in &downloads.models {
        let display = display::Display::new(err);
        let fetched = crate::hub::fetch(model, &downloads.options, &|it| display.show(it)).await;
        display.finish();
        let path = fetched.map_err(|source| DownloadError::Model {
            setting: setting.clone(),
            source,
        })?;
        files.insert(model.clone(), path);
    }
    Ok(files)
}
