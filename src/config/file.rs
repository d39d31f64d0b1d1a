//! The optional settings file: TOML whose keys are the flags' names with `_` for `-`.
//!
//! One file may serve `serve`, `engine` and `gateway`: each takes the keys that concern it. A key that
//! no command knows is an error.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, Command};
use serde::de::DeserializeOwned;
use toml::Table;

use super::{ConfigError, EngineCommand, GatewayCommand, Serve};

#[derive(Args)]
pub(super) struct FileOption {
    /// A TOML file with settings; its keys are the names of the flags with `_` for `-`
    #[arg(long, env = "TOKENWAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// A settings file's keys; none where there is no file.
pub(super) struct SettingsFile {
    path: String,
    keys: Table,
}

impl FileOption {
    /// Reads the file, if there is one.
    pub(super) fn read(&self) -> Result<SettingsFile, ConfigError> {
        let Some(path) = &self.config else {
            return Ok(SettingsFile {
                path: String::new(),
                keys: Table::new(),
            });
        };
        let path_text = path.display().to_string();
        let problem = |problem: String| ConfigError::File {
            path: path_text.clone(),
            problem,
        };
        let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let keys: Table = text.parse().map_err(|error| problem(format!("{error}")))?;
        let known = known_keys();
        if let Some(unknown) = keys.keys().find(|key| !known.contains(key.as_str())) {
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            return Err(problem(format!(
                "the key '{unknown}' is unknown; the keys are {}",
                known.join(", ")
            )));
        }
        Ok(SettingsFile {
            path: path_text,
            keys,
        })
    }
}

impl SettingsFile {
    /// The settings of one kind.
    pub(super) fn settings<S: DeserializeOwned>(&self) -> Result<S, ConfigError> {
        let problem = |problem: String| ConfigError::File {
            path: self.path.clone(),
            problem,
        };
        // One by one first: an error of the whole does not always say which key is at fault.
        for (key, value) in &self.keys {
            let alone = Table::from_iter([(key.clone(), value.clone())]);
            if let Err(error) = alone.try_into::<S>() {
                return Err(problem(format!("{key}: {}", in_words(error.message()))));
            }
        }
        let settings = self.keys.clone().try_into();
        settings.map_err(|error: toml::de::Error| problem(error.to_string()))
    }
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
    let arguments = commands.iter().flat_map(Command::get_arguments);
    arguments
        .map(|argument| argument.get_id().as_str().to_owned())
        .filter(|name| name != "config")
        .collect()
}
