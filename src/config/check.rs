//! `tokenway config check`: reports all problems of a settings file.

use clap::Command;

use super::commands::{GatewaySettings, ServeSettings, ServerCommand, known_keys, resolve_server};
use super::error::{ConfigError, FileError};
use super::file::{ParsedFile, SettingsFile};
use super::model::ModelSettings;
use super::settings::Settings;

/// Checks the settings file at `path`. Returns the text to print for a valid file.
///
/// # Errors
/// All problems of the file.
pub(super) fn check_file(path: &str) -> Result<String, ConfigError> {
    let ParsedFile { file, mut errors } = ParsedFile::read(path, &known_keys());
    errors.extend(value_errors(&file)?);
    errors.sort_by_key(|error| error.position);
    if errors.is_empty() {
        errors.extend(combination_error::<ServeSettings>(path, &file)?);
        let has_engines = file.top.entries.iter().any(|entry| entry.key == "engine");
        if has_engines && errors.is_empty() {
            errors.extend(combination_error::<GatewaySettings>(path, &file)?);
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

/// Returns the first error about a combination of settings for the command `S`.
fn combination_error<S: ServerCommand>(
    path: &str,
    file: &SettingsFile,
) -> Result<Option<FileError>, ConfigError> {
    let mut settings = default_settings::<S>()?;
    settings.add_file::<S>(file).map_err(ConfigError::Check)?;
    match resolve_server::<S>(&settings) {
        Ok(_) => Ok(None),
        Err(ConfigError::File(error)) => Ok(Some(error)),
        Err(error) => Ok(Some(FileError {
            path: path.to_owned(),
            position: None,
            problem: error.to_string(),
        })),
    }
}

/// Returns the default settings of a command, without flags and environment variables.
pub(super) fn default_settings<S: ServerCommand>() -> Result<Settings, ConfigError> {
    let command = S::augment_args(Command::new("settings"));
    let command = command.mut_args(|argument| argument.env(None::<&'static str>));
    Settings::from_matches::<S>(&command.try_get_matches_from(["settings"])?)
}
