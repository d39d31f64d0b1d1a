//! The interface between the settings of one kind of runner and the rest of `config`. It must not know the individual
//! runners.

use std::sync::Arc;

use clap::{ArgMatches, Command};
use toml::Table;

use crate::config::error::ConfigError;
use crate::config::settings::{DeclaredSettings, Settings, keys};
use crate::runner::Loader;

/// The settings of one kind of runner.
pub(super) trait KindSettings: DeclaredSettings {
    /// The value of `--runner` that selects this runner.
    const NAME: &'static str;

    /// Help text for this value of `--runner`.
    const HELP: &'static str;

    /// Processes that can run a model with this runner.
    const PLACE: RunnerPlace = RunnerPlace::Local;

    /// Defaults of settings whose default depends on the runner, such as `slots`.
    fn defaults(&self) -> Table;

    /// Builds the loader of the model. `settings` names the settings in errors.
    ///
    /// # Errors
    /// A setting is missing or invalid.
    fn loader(self, settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError>;
}

/// Processes that can run a model with a given runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum RunnerPlace {
    /// Workers that the engine starts, and remote workers.
    Local,
    /// Remote workers only.
    Remote,
}

/// One kind of runner: its name, its settings and its loader.
#[derive(Clone, Copy, Debug)]
pub(in crate::config) struct RunnerKind {
    pub(in crate::config) name: &'static str,
    pub(super) help: &'static str,
    pub(in crate::config) place: RunnerPlace,
    /// Returns the keys of this runner's settings.
    pub(in crate::config) keys: fn() -> Vec<String>,
    pub(super) augment: fn(Command) -> Command,
    /// Returns the values of this runner's settings that clap has parsed.
    pub(super) parsed: fn(&ArgMatches) -> Result<Table, clap::Error>,
    /// Checks that each of this runner's settings in a table has the right type.
    pub(super) check: fn(Table) -> Result<(), toml::de::Error>,
    pub(super) defaults: fn(&Settings) -> Result<Table, ConfigError>,
    pub(super) loader: fn(&Settings) -> Result<Arc<dyn Loader>, ConfigError>,
}

impl RunnerKind {
    /// Describes the kind of runner whose settings are `S`.
    pub(super) const fn of<S: KindSettings>() -> Self {
        Self {
            name: S::NAME,
            help: S::HELP,
            place: S::PLACE,
            keys: keys::<S>,
            augment: S::augment_args,
            parsed: parsed::<S>,
            check: check::<S>,
            defaults: |settings| Ok(settings.get::<S>()?.defaults()),
            loader: |settings| settings.get::<S>()?.loader(settings),
        }
    }
}

fn parsed<S: KindSettings>(matches: &ArgMatches) -> Result<Table, clap::Error> {
    let settings = Table::try_from(S::from_arg_matches(matches)?);
    settings.map_err(|error| clap::Error::raw(clap::error::ErrorKind::ValueValidation, error))
}

fn check<S: KindSettings>(values: Table) -> Result<(), toml::de::Error> {
    values.try_into::<S>().map(drop)
}
