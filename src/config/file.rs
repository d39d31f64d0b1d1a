//! The optional settings file: TOML whose keys are the flags' names with `_` for `-`.
//!
//! One file may serve `serve`, `engine` and `gateway`: each takes the keys that concern it. A key that
//! no command knows is an error, and so is one that no model knows in a `[[model]]` table.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, Command};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::model::ModelSettings;
use super::{ConfigError, EngineCommand, GatewayCommand, Serve};

/// The key of the tables that have a model each.
const MODEL: &str = "model";

#[derive(Args)]
pub(super) struct FileOption {
    /// A TOML file with settings; its keys are the names of the flags with `_` for `-`, and a
    /// `[[model]]` table for each model serves several
    #[arg(long, env = "TOKENWAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// A settings file's keys; none where there is no file.
#[derive(Default)]
pub(super) struct SettingsFile {
    path: String,
    keys: Table,
    models: Vec<Table>,
}

impl FileOption {
    /// Reads the file, if there is one.
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
                "the key '{unknown}' is unknown; the keys are {known}"
            )));
        }
        if let Some(models) = file.keys.remove(MODEL) {
            file.models = file.model_tables(models)?;
        }
        Ok(file)
    }
}

impl SettingsFile {
    /// The settings of one kind.
    pub(super) fn settings<S: DeserializeOwned>(&self) -> Result<S, ConfigError> {
        self.settings_in(&self.keys, "")
    }

    /// The settings of each `[[model]]` table.
    pub(super) fn models<S: DeserializeOwned>(&self) -> Result<Vec<S>, ConfigError> {
        let tables = (1..).zip(&self.models);
        tables
            .map(|(number, table)| self.settings_in(table, &in_model(number)))
            .collect()
    }

    /// Whether it has this key, above its tables.
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
        // One by one first: an error of the whole does not always say which key is at fault.
        for (key, value) in keys {
            let alone = Table::from_iter([(key.clone(), value.clone())]);
            if let Err(error) = alone.try_into::<S>() {
                let problem = format!("{prefix}{key}: {}", in_words(error.message()));
                return Err(self.error(problem));
            }
        }
        let settings = keys.clone().try_into();
        settings.map_err(|error: toml::de::Error| self.error(error.to_string()))
    }

    /// The tables under `[[model]]`, whose keys are known.
    fn model_tables(&self, value: Value) -> Result<Vec<Table>, ConfigError> {
        let no_tables = || self.error("model: each model is a table under [[model]]".to_owned());
        let models: Vec<Table> = value.try_into().map_err(|_| no_tables())?;
        if models.is_empty() {
            return Err(no_tables());
        }
        let mut known = BTreeSet::from(["name", "aliases"].map(str::to_owned));
        known.extend(model_keys());
        for (number, model) in (1..).zip(&models) {
            if let Some(unknown) = model.keys().find(|key| !known.contains(*key)) {
                let (prefix, known) = (in_model(number), list(&known));
                return Err(self.error(format!(
                    "the key '{prefix}{unknown}' is unknown; the keys of a model are {known}; the \
                     server's stand above the first [[model]]"
                )));
            }
        }
        Ok(models)
    }
}

/// What stands before a key of a `[[model]]` table where it is named; tables are counted from 1.
fn in_model(number: usize) -> String {
    format!("{MODEL}[{number}].")
}

fn list(keys: &BTreeSet<String>) -> String {
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    keys.join(", ")
}

/// Says what was expected as TOML calls it, not as Rust does.
fn in_words(message: &str) -> String {
    let words = [
        ("expected i64", "expected a whole number"),
        (
            "expected u32",
            "expected a whole number from 0 to 4294967295",
        ),
        ("expected f64", "expected a number"),
        ("expected path string", "expected a string"),
        ("expected a sequence", "expected a list"),
    ];
    let mut message = message.to_owned();
    for (rust, toml) in words {
        message = message.replace(rust, toml);
    }
    message
}

/// The keys of all commands: clap knows them as the fields' names.
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

/// The keys of a model that are flags, too.
pub(super) fn model_keys() -> Vec<String> {
    keys(&ModelSettings::augment_args(Command::new(MODEL)))
}

fn keys(command: &Command) -> Vec<String> {
    let arguments = command.get_arguments();
    let keys = arguments.map(|argument| argument.get_id().as_str().to_owned());
    keys.collect()
}
