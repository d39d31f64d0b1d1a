//! The optional settings file: TOML whose keys are the flags' names with `_` instead of `-`.
//!
//! `serve`, `engine` and `gateway` can share one file: each uses the keys that it knows. A key that no
//! command knows is an error; in a `[[model]]` table, a key that is no model setting is an error.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, Command};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::model::ModelSettings;
use super::{ConfigError, EngineCommand, GatewayCommand, Serve};

/// Key of the `[[model]]` tables.
const MODEL: &str = "model";

#[derive(Args)]
pub(super) struct FileOption {
    /// Path of a TOML file with settings. Its keys are the flags' names with `_` instead of `-`. To serve
    /// several models, write one `[[model]]` table per model [default: none]
    #[arg(long, env = "TOKENWAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The keys of the settings file. Empty if there is no file.
#[derive(Default)]
pub(super) struct SettingsFile {
    path: String,
    keys: Table,
    models: Vec<Table>,
}

impl FileOption {
    /// Reads the file if `--config` is set.
    pub(super) fn read(&self) -> Result<SettingsFile, ConfigError> {
        let mut file = SettingsFile::default();
        let Some(path) = &self.config else {
            return Ok(file);
        };
        file.path = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| file.error(error.to_string()))?;
        file.keys = text
            .parse()
            .map_err(|error: toml::de::Error| file.error(error.to_string()))?;
        let known = known_keys();
        if let Some(unknown) = file.keys.keys().find(|key| !known.contains(*key)) {
            let known = list(&known);
            return Err(file.error(format!(
                "the key '{unknown}' is unknown; known keys are {known}"
            )));
        }
        if let Some(models) = file.keys.remove(MODEL) {
            file.models = file.model_tables(models)?;
        }
        Ok(file)
    }
}

impl SettingsFile {
    /// Reads the settings of type `S` from the keys outside `[[model]]` tables.
    pub(super) fn settings<S: DeserializeOwned>(&self) -> Result<S, ConfigError> {
        self.settings_in(&self.keys, "")
    }

    /// Reads the settings of each `[[model]]` table.
    pub(super) fn models<S: DeserializeOwned>(&self) -> Result<Vec<S>, ConfigError> {
        let tables = (1..).zip(&self.models);
        tables
            .map(|(number, table)| self.settings_in(table, &model_prefix(number)))
            .collect()
    }

    /// Returns true if the key is set outside `[[model]]` tables.
    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    pub(super) fn error(&self, problem: String) -> ConfigError {
        ConfigError::File {
            path: self.path.clone(),
            problem,
        }
    }

    fn settings_in<S: DeserializeOwned>(
        &self,
        keys: &Table,
        prefix: &str,
    ) -> Result<S, ConfigError> {
        // Check each key alone first, because an error of the whole table may not name the key.
        for (key, value) in keys {
            let alone = Table::from_iter([(key.clone(), value.clone())]);
            if let Err(error) = alone.try_into::<S>() {
                let problem = format!("{prefix}{key}: {}", with_toml_types(error.message()));
                return Err(self.error(problem));
            }
        }
        let settings = keys.clone().try_into();
        settings.map_err(|error: toml::de::Error| self.error(error.to_string()))
    }

    /// The `[[model]]` tables, after a check of their keys.
    fn model_tables(&self, value: Value) -> Result<Vec<Table>, ConfigError> {
        let no_tables =
            || self.error("model: write each model as a table under [[model]]".to_owned());
        let models: Vec<Table> = value.try_into().map_err(|_| no_tables())?;
        if models.is_empty() {
            return Err(no_tables());
        }
        let mut known = BTreeSet::from(["name", "aliases"].map(str::to_owned));
        known.extend(model_keys());
        for (number, model) in (1..).zip(&models) {
            if let Some(unknown) = model.keys().find(|key| !known.contains(*key)) {
                let (prefix, known) = (model_prefix(number), list(&known));
                return Err(self.error(format!(
                    "the key '{prefix}{unknown}' is unknown; known keys of a model are {known}; \
                     server keys must be above the first [[model]]"
                )));
            }
        }
        Ok(models)
    }
}

/// The prefix of a `[[model]]` table's keys in errors. Tables are numbered from 1.
fn model_prefix(number: usize) -> String {
    format!("{MODEL}[{number}].")
}

fn list(keys: &BTreeSet<String>) -> String {
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    keys.join(", ")
}

/// Replaces names of Rust types in an error message with TOML's.
fn with_toml_types(message: &str) -> String {
    let names = [
        ("expected i64", "expected an integer"),
        ("expected u32", "expected an integer from 0 to 4294967295"),
        ("expected f64", "expected a number"),
        ("expected path string", "expected a string"),
        ("expected a sequence", "expected a list"),
    ];
    let mut message = message.to_owned();
    for (rust, toml) in names {
        message = message.replace(rust, toml);
    }
    message
}

/// The keys of all commands. clap's argument ids are the field names, which are the keys.
fn known_keys() -> BTreeSet<String> {
    let commands = [
        Serve::augment_args(Command::new("serve")),
        EngineCommand::augment_args(Command::new("engine")),
        GatewayCommand::augment_args(Command::new("gateway")),
    ];
    let keys = commands.iter().flat_map(keys);
    keys.filter(|name| name != "config")
        .chain([MODEL.to_owned()])
        .collect()
}

/// The keys of a `[[model]]` table that are also flags.
pub(super) fn model_keys() -> Vec<String> {
    keys(&ModelSettings::augment_args(Command::new(MODEL)))
}

fn keys(command: &Command) -> Vec<String> {
    let arguments = command.get_arguments();
    let keys = arguments.map(|argument| argument.get_id().as_str().to_owned());
    keys.collect()
}
