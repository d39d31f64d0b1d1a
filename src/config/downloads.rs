//! Models on the Hugging Face Hub that must be downloaded before a server or a worker can be built.

use super::error::ConfigError;
use super::hub_variables::hub_options;
use super::runner::hub_model;
use super::settings::Settings;
use crate::server::run::{Downloads, ModelFiles, PendingModel};

/// Returns the models on the Hub that these settings name. `None` if they name no such model.
pub(super) fn downloads(models: &[Settings]) -> Result<Option<Downloads>, ConfigError> {
    let models = models.iter().filter_map(|settings| {
        Some(PendingModel {
            model: hub_model(settings)?,
            setting: settings.name("model"),
        })
    });
    let models: Vec<_> = models.collect();
    if models.is_empty() {
        return Ok(None);
    }
    let options = hub_options(|name| std::env::var(name))?;
    Ok(Some(Downloads { models, options }))
}

/// Parts of a server or a worker that can be built once the models are downloaded.
pub struct AfterDownload<T> {
    /// The models to download first. `None` if the settings name no model on the Hub.
    pub downloads: Option<Downloads>,
    build: Build<T>,
}

/// A function that builds the parts with the files of the downloaded models.
type Build<T> = Box<dyn FnOnce(&ModelFiles) -> Result<T, ConfigError> + Send>;

impl<T: Send + 'static> AfterDownload<T> {
    /// Keeps `parts` if there are no downloads. Otherwise drops them, because building them has only checked the
    /// settings. `build` then builds the parts again after the download.
    pub(super) fn new(
        parts: T,
        downloads: Option<Downloads>,
        build: impl FnOnce(&ModelFiles) -> Result<T, ConfigError> + Send + 'static,
    ) -> Self {
        let build: Build<T> = match downloads {
            None => Box::new(|_| Ok(parts)),
            Some(_) => Box::new(build),
        };
        Self { downloads, build }
    }

    /// Builds the parts with the files of the downloaded models.
    ///
    /// # Errors
    /// A downloaded file is not a model.
    pub fn build(self, files: &ModelFiles) -> Result<T, ConfigError> {
        (self.build)(files)
    }
}
