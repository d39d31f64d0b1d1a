//! Errors about settings.

use std::fmt;

/// The reason the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An error of clap about the command line or the environment. `--help` and `--version` are such
    /// errors too.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The settings file cannot be read or is invalid.
    #[error("settings file {0}")]
    File(FileError),
    /// A setting is invalid in combination with others.
    #[error("{0}")]
    Invalid(String),
    /// `tokenway config check` found problems.
    #[error("{}", lines(.0))]
    Check(Vec<FileError>),
}

/// An error about a settings file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}{}: {problem}", suffix(.position.as_ref()))]
pub struct FileError {
    /// Path of the file.
    pub path: String,
    /// Place of the error, if the error has one.
    pub position: Option<Position>,
    /// Description of the error.
    pub problem: String,
}

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Number of the line, from 1.
    pub line: usize,
    /// Number of the character in the line, from 1.
    pub column: usize,
}

impl Position {
    /// The place of the byte at `offset` in `text`.
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

fn suffix(position: Option<&Position>) -> String {
    position.map_or_else(String::new, |position| format!(":{position}"))
}

fn lines(errors: &[FileError]) -> String {
    let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n")
}
