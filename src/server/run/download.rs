//! Downloads the models of a server or worker before it starts, and shows the progress. A signal ends the program. The
//! next start continues the download.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::hub::{HubModel, HubOptions};
use crate::output::Output;

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

/// Fails, because a build without llama.cpp needs no model files.
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

#[cfg(feature = "llama-cpp")]
mod display {
    use std::sync::{Mutex, PoisonError};

    use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

    use super::super::progress::draw_target;
    use crate::hub::DownloadProgress;
    use crate::output::Output;

    /// Progress between two log lines about a download, in per cent.
    const LOG_STEP_PERCENT: u64 = 10;

    const TEMPLATE: &str = "download {bar:30} {decimal_bytes}/{decimal_total_bytes} \
                            {decimal_bytes_per_sec} {eta} {wide_msg}";

    /// Progress of the download of one model: a bar on a terminal, otherwise log lines.
    pub(super) struct Display {
        bar: ProgressBar,
        /// The current file, and the percentage of its last log line.
        logged: Mutex<(String, u64)>,
    }

    impl Display {
        pub(super) fn new(err: &Output) -> Self {
            let bar = ProgressBar::new(0);
            bar.set_draw_target(draw_target(err));
            let style = ProgressStyle::with_template(TEMPLATE);
            bar.set_style(style.expect("the progress bar's template is valid"));
            Self {
                bar,
                logged: Mutex::default(),
            }
        }

        pub(super) fn show(&self, progress: DownloadProgress<'_>) {
            let DownloadProgress {
                file,
                received,
                size,
            } = progress;
            let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
            let is_new_file = logged.0 != file;
            if is_new_file {
                *logged = (file.to_owned(), 0);
                self.bar.set_length(size);
                self.bar.set_message(file.to_owned());
                self.bar.set_position(received);
                // The bytes of an earlier download must not count for the speed and the remaining time.
                self.bar.reset_eta();
            }
            self.bar.set_position(received);
            if !self.bar.is_hidden() {
                return;
            }
            let percent = received.saturating_mul(100) / size.max(1);
            if is_new_file {
                let (size, received) = (DecimalBytes(size), DecimalBytes(received));
                tracing::info!(file, %size, %received, "downloading");
                logged.1 = percent;
            } else if percent >= logged.1 + LOG_STEP_PERCENT {
                tracing::info!(file, percent, "downloading");
                logged.1 = percent - percent % LOG_STEP_PERCENT;
            }
        }

        pub(super) fn finish(&self) {
            self.bar.finish_and_clear();
        }
    }
}
