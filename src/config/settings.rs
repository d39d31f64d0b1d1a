//! The settings of a command or of a model in one table, each value with its source.
//!
//! The table is built from the flags and environment variables that clap has parsed, and from the settings file. The
//! table is then deserialised into the struct that declares the settings.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::cluster::ClusterFile;
use super::error::{ConfigError, FileError};
use super::file::{FileTable, SettingLocation, SettingsFile, table_key};

/// A struct that declares settings. Each field is a flag, an environment variable and a key of the settings file.
pub(super) trait DeclaredSettings: Args + Serialize + DeserializeOwned {}

impl<T: Args + Serialize + DeserializeOwned> DeclaredSettings for T {}

/// Returns the keys of the settings that `S` declares. clap uses the names of the fields as argument ids, and the
/// keys are the same names.
pub(super) fn keys<S: Args>() -> Vec<String> {
    let command = S::augment_args(Command::new("settings"));
    let keys = command.get_arguments().map(argument_key);
    keys.collect()
}

fn argument_key(argument: &Arg) -> String {
    argument.get_id().as_str().to_owned()
}

/// Returns the flag of the setting with this key, such as `--slots`.
pub(super) fn flag(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// The origin of a setting's value: a flag, an environment variable, the settings file or the default.
#[derive(Clone, Debug)]
pub(super) enum SettingSource {
    Default,
    Flag,
    /// The environment variable with this name.
    Variable(String),
    File(SettingLocation),
}

/// The settings of a command, or of one model.
#[derive(Clone)]
pub(super) struct Settings {
    /// The values of the settings that have one.
    pub(super) values: Table,
    /// The source of every setting, even of a setting without a value.
    pub(super) sources: BTreeMap<String, SettingSource>,
    /// The `[[model]]` tables of the file.
    pub(super) tables: Vec<FileTable>,
    /// The `[[engine]]` and `[[route]]` tables of the file.
    pub(super) cluster: Arc<ClusterFile>,
    /// Position of the `[[model]]` table that these settings come from. `None` for settings outside the tables.
    table: Option<SettingLocation>,
}

impl Settings {
    /// Takes the values of the settings that `S` declares from the parsed command line and environment, including
    /// their defaults.
    pub(super) fn from_matches<S: DeclaredSettings>(
        matches: &ArgMatches,
    ) -> Result<Self, ConfigError> {
        let parsed = S::from_arg_matches(matches)?;
        let values = Table::try_from(&parsed);
        let command = S::augment_args(Command::new("settings"));
        let arguments = command.get_arguments();
        let sources =
            arguments.map(|argument| (argument_key(argument), argument_source(argument, matches)));
        Ok(Self {
            values: values.map_err(|error| ConfigError::Invalid(error.to_string()))?,
            sources: sources.collect(),
            tables: Vec::new(),
            cluster: Arc::default(),
            table: None,
        })
    }

    /// Adds the values of a settings file for the settings that `S` declares. A flag or an environment variable
    /// overrides the file.
    ///
    /// # Errors
    /// The errors of all values.
    pub(super) fn add_file<S: DeclaredSettings>(
        &mut self,
        file: &SettingsFile,
    ) -> Result<(), Vec<FileError>> {
        self.tables.clone_from(&file.models);
        self.cluster = Arc::clone(&file.cluster);
        self.add_table::<S>(&file.top)
    }

    /// Returns the settings of a `[[model]]` table. A setting that the table does not contain has its value from
    /// outside the tables.
    ///
    /// # Errors
    /// The errors of all values.
    pub(super) fn for_model_table<S: DeclaredSettings>(
        &self,
        table: &FileTable,
    ) -> Result<Self, Vec<FileError>> {
        let mut model = self.only_declared::<S>();
        model.table.clone_from(&table.header);
        // A key in a `[[model]]` table overrides the flag, because the flag applies to all models.
        for entry in &table.entries {
            if let Some(source) = model.sources.get_mut(&entry.key) {
                *source = SettingSource::Default;
            }
        }
        model.add_table::<S>(table)?;
        Ok(model)
    }

    fn add_table<S: DeclaredSettings>(&mut self, table: &FileTable) -> Result<(), Vec<FileError>> {
        let mut errors = Vec::new();
        for entry in &table.entries {
            let Some(source) = self.sources.get(&entry.key) else {
                // The key belongs to another command, which checks the key itself.
                continue;
            };
            let is_overridden = matches!(source, SettingSource::Flag | SettingSource::Variable(_));
            // All values in the table so far are valid, so an error now is about this value.
            let mut values = self.values.clone();
            values.insert(entry.key.clone(), entry.value.clone());
            if let Err(error) = values.clone().try_into::<S>() {
                let name = &entry.location.name;
                let problem = format!("{name}: {}", use_toml_type_names(error.message()));
                errors.push(entry.location.error(problem));
            } else if !is_overridden {
                self.values = values;
                let source = SettingSource::File(entry.location.clone());
                self.sources.insert(entry.key.clone(), source);
            }
        }
        match errors.is_empty() {
            true => Ok(()),
            false => Err(errors),
        }
    }

    /// Returns a copy with only the settings that `S` declares.
    pub(super) fn only_declared<S: Args>(&self) -> Self {
        let keys = keys::<S>();
        let mut narrowed = self.clone();
        narrowed
            .values
            .retain(|key, _| keys.iter().any(|it| it == key));
        narrowed.sources.retain(|key, _| keys.contains(key));
        narrowed
    }

    /// Sets a default that depends on other settings, unless the setting already has a value.
    pub(super) fn set_default(&mut self, key: &str, value: impl Into<Value>) {
        if !self.values.contains_key(key) {
            self.values.insert(key.to_owned(), value.into());
        }
    }

    /// Deserialises the settings that `S` declares.
    pub(super) fn get<S: DeclaredSettings>(&self) -> Result<S, ConfigError> {
        let settings = self.values.clone().try_into();
        settings.map_err(|error| ConfigError::Invalid(error.to_string()))
    }

    /// Returns true if a flag, an environment variable or the file sets this key.
    pub(super) fn is_set(&self, key: &str) -> bool {
        let source = self.sources.get(key);
        source.is_some_and(|source| !matches!(source, SettingSource::Default))
    }

    /// Returns the keys of the settings whose values differ from those in `other`.
    pub(super) fn changed_keys(&self, other: &Self) -> Vec<String> {
        let keys = self.sources.keys();
        let changed = keys.filter(|key| self.values.get(*key) != other.values.get(*key));
        changed.cloned().collect()
    }

    /// Returns the name of a setting as its source spells it: `--slots`, `TOKENWAY_SLOTS` or `model[1].slots`.
    pub(super) fn name(&self, key: &str) -> String {
        match (self.sources.get(key), &self.table) {
            (Some(SettingSource::Variable(name)), _) => name.clone(),
            (Some(SettingSource::File(location)), _) => location.name.clone(),
            (Some(SettingSource::Default) | None, Some(table)) => {
                format!("{}.{}", table.name, table_key(key))
            }
            (Some(SettingSource::Flag | SettingSource::Default) | None, _) => flag(key),
        }
    }

    /// Creates an error about a setting, with the file and the line if the value comes from a file. `problem` must
    /// name the setting.
    pub(super) fn error(&self, key: &str, problem: String) -> ConfigError {
        match (self.sources.get(key), &self.table) {
            (Some(SettingSource::File(location)), _)
            | (Some(SettingSource::Default) | None, Some(location)) => {
                ConfigError::File(location.error(problem))
            }
            _ => ConfigError::Invalid(problem),
        }
    }
}

fn argument_source(argument: &Arg, matches: &ArgMatches) -> SettingSource {
    match matches.value_source(argument.get_id().as_str()) {
        Some(ValueSource::CommandLine) => SettingSource::Flag,
        Some(ValueSource::EnvVariable) => {
            let variable = argument.get_env().unwrap_or_default();
            SettingSource::Variable(variable.to_string_lossy().into_owned())
        }
        Some(_) | None => SettingSource::Default,
    }
}

/// Replaces the names of Rust types in a message of the `toml` crate with TOML's names, for example "integer" for
/// `i64`.
pub(super) fn use_toml_type_names(message: &str) -> String {
    let names = [
        ("expected i64", "expected an integer"),
        ("expected u32", "expected an integer from 0 to 4294967295"),
        ("expected f64", "expected a number"),
        ("expected a sequence", "expected a list"),
        ("invalid type: sequence", "invalid type: list"),
        ("invalid type: map", "invalid type: table"),
    ];
    let mut message = message.to_owned();
    for (rust, toml) in names {
        message = message.replace(rust, toml);
    }
    message
}
