//! The runner `attached`: a model whose workers are all remote and bring their own runner.

use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::kind::{KindSettings, RunnerPlace};
use crate::config::error::ConfigError;
use crate::config::settings::Settings;
use crate::runner::{LoadError, LoadedModel, Loader};

#[derive(Args, Serialize, Deserialize)]
pub(super) struct AttachedSettings {}

impl KindSettings for AttachedSettings {
    const NAME: &'static str = "attached";
    const HELP: &'static str = "No local runner: remote workers connect and serve the model";
    const PLACE: RunnerPlace = RunnerPlace::Remote;

    fn defaults(&self) -> Table {
        Table::new()
    }

    fn loader(self, _settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError> {
        Ok(Arc::new(AttachedLoader))
    }
}

/// The loader of a model without local workers. It always fails, because remote workers load the model.
struct AttachedLoader;

impl Loader for AttachedLoader {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        Err(LoadError(
            "the model has only remote workers; the engine cannot load it".to_owned(),
        ))
    }

    fn name(&self) -> &'static str {
        AttachedSettings::NAME
    }
}
