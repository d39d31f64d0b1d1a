//! The optional settings file: TOML whose keys are the flags' names with `_` for `-`.
//!
//! One file may serve `serve`, `engine` and `gateway`: each takes the keys that concern it. A key that
//! no command knows is an error.

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
        if let Some(unknown) = keys.keys().find(|key| !known.contains(key)) {
            let flag = unknown.replace('-', "_");
            let advice = if known.contains(&flag) {
                format!("it is written {flag}")
            } else {
                "`tokenway serve --help` lists the flags, whose names the keys have, with _ for -"
                    .to_owned()
            };
            return Err(problem(format!("the key '{unknown}' is unknown; {advice}")));
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
        self.keys
            .clone()
            .try_into()
            .map_err(|error: toml::de::Error| ConfigError::File {
                path: self.path.clone(),
                problem: error.to_string(),
            })
    }
}

/// The keys of all commands: clap knows them as the fields' names.
fn known_keys() -> Vec<String> {
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
