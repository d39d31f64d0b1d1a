//! `tokenway config check`: reports all problems of a settings file.

use clap::Command;

use super::cluster::ENGINE_KEY;
use super::commands::{GatewaySettings, ServeSettings, ServerCommand, known_keys, resolve_server};
use super::error::{ConfigError, FileError};
use super::file::{FileEntry, ParsedFile, SettingsFile};
use super::model::ModelSettings;
use super::settings::Settings;
use crate::server::run::ModelFiles;

/// Checks the settings file at `path`. Returns the text to print for a valid file.
///
/// # Errors
/// All problems of the file.
pub(super) fn check_file(path: &str) -> Result<String, ConfigError> {
    let ParsedFile { file, mut errors } = ParsedFile::read(path, &known_keys());
    errors.extend(value_errors(&file)?);
    errors.sort_by_key(|error| error.position);
    if errors.is_empty() {
        errors.extend(combination_errors::<ServeSettings>(path, &file)?);
        let is_list = |entry: &FileEntry| entry.key == ENGINE_KEY;
        let has_engines = file.cluster.has_engines() || file.top.entries.iter().any(is_list);
        if has_engines && errors.is_empty() {
            errors.extend(combination_errors::<GatewaySettings>(path, &file)?);
        }
    }
    match errors.is_empty() {
        true => Ok(format!("{path} is valid\n")),
        false => Err(ConfigError::Check(errors)),
    }
}

/// Returns the errors of all values that are invalid by themselves.
fn value_errors(file: &SettingsFile) -> Result<Vec<FileError>, ConfigError> {
    let mut serve = default_settings::<ServeSettings>()?;
    let mut errors = serve
        .add_file::<ServeSettings>(file)
        .err()
        .unwrap_or_default();
    let gateway = default_settings::<GatewaySettings>()?.add_file::<GatewaySettings>(file);
    errors.extend(gateway.err().unwrap_or_default());
    errors.extend_from_slice(file.cluster.errors());
    for table in &file.models {
        let model = serve.for_model_table::<ModelSettings>(table);
        errors.extend(model.err().unwrap_or_default());
    }
    let mut unique: Vec<FileError> = Vec::new();
    for error in errors {
        // `serve` and `gateway` share many settings, so both report the same error.
        if !unique.contains(&error) {
            unique.push(error);
        }
    }
    Ok(unique)
}

/// Returns the errors about combinations of settings for the command `S`: all errors about engines and routes, or the
/// first error about other settings.
fn combination_errors<S: ServerCommand>(
    path: &str,
    file: &SettingsFile,
) -> Result<Vec<FileError>, ConfigError> {
    let mut settings = default_settings::<S>()?;
    settings.add_file::<S>(file).map_err(ConfigError::Check)?;
    match resolve_server::<S>(&settings, &ModelFiles::new()) {
        Ok(_) => Ok(Vec::new()),
        Err(ConfigError::Check(errors)) => Ok(errors),
        Err(ConfigError::File(error)) => Ok(vec![error]),
        Err(error @ (ConfigError::CommandLine(_) | ConfigError::Invalid(_))) => {
            Ok(vec![FileError {
                path: path.to_owned(),
                position: None,
                problem: error.to_string(),
            }])
        }
    }
}

/// Returns the default settings of a command, without flags and environment variables.
pub(super) fn default_settings<S: ServerCommand>() -> Result<Settings, ConfigError> {
    let command = S::augment_args(Command::new("settings"));
    let command = command.mut_args(|argument| argument.env(None::<&'static str>));
    Settings::from_matches::<S>(&command.try_get_matches_from(["settings"])?)
}
