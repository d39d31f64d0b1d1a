//! Errors about settings.

use std::fmt;

use clap::error::{ContextKind, ContextValue};

use crate::cluster::without_secrets;

/// The error of invalid settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An error from clap, about the command line or the environment. clap also returns the output of `--help` and
    /// `--version` as such an error.
    #[error(transparent)]
    CommandLine(clap::Error),
    /// The settings file cannot be read or is invalid.
    #[error("settings file {0}")]
    File(FileError),
    /// A setting is invalid in combination with others.
    #[error("{0}")]
    Invalid(String),
    /// Several problems of the settings file, as `tokenway config check` reports them.
    #[error("{}", error_lines(.0))]
    Check(Vec<FileError>),
}

impl ConfigError {
    /// Reduces several problems of the settings file to the first one.
    pub(super) fn first(self) -> Self {
        match self {
            Self::Check(errors) => first_error(errors),
            error @ (Self::CommandLine(_) | Self::File(_) | Self::Invalid(_)) => error,
        }
    }
}

/// Converts several errors to the first of them.
pub(super) fn first_error(errors: Vec<FileError>) -> ConfigError {
    let first = errors.into_iter().next();
    ConfigError::File(first.expect("a failed check returns at least one error"))
}

impl From<clap::Error> for ConfigError {
    /// Removes the passwords from an invalid address of an engine, which clap repeats in its error.
    fn from(mut error: clap::Error) -> Self {
        if let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
            && argument.starts_with("--engine ")
            && let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        {
            let value = ContextValue::String(without_secrets(value));
            error.insert(ContextKind::InvalidValue, value);
        }
        Self::CommandLine(error)
    }
}

/// An error about a settings file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}{}: {problem}", position_suffix(.position.as_ref()))]
pub struct FileError {
    /// Path of the file.
    pub path: String,
    /// Line and column of the error; `None` if the error concerns the whole file.
    pub position: Option<Position>,
    /// Description of the problem, without the path and the line.
    pub problem: String,
}

/// A position in a text file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Number of the line, from 1.
    pub line: usize,
    /// Number of the character in the line, from 1.
    pub column: usize,
}

impl Position {
    /// Converts a byte offset in `text` to a line and a column.
    pub(super) fn at(text: &str, offset: usize) -> Self {
        let before = &text[..text.floor_char_boundary(offset)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

fn position_suffix(position: Option<&Position>) -> String {
    position.map_or_else(String::new, |position| format!(":{position}"))
}

fn error_lines(errors: &[FileError]) -> String {
    let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n")
}
