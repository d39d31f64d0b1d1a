//! The optional settings file: TOML whose keys are the flags' names with `_` instead of `-`.
//!
//! `serve`, `engine` and `gateway` can share one file. Each command ignores the keys of the others. A key that
//! belongs to no command is an error, and so is a key in a `[[model]]` table that is not a setting of a model. The
//! `[[engine]]` and `[[route]]` tables are for `gateway` only, which checks them.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::cluster::ClusterFile;
use super::error::{ConfigError, FileError, Position, first_error};
use super::nested_tables::SourceFile;

/// Key of the `[[model]]` tables. A string value is the setting `model`; a list is the tables.
const MODEL_TABLES_KEY: &str = "model";

/// Settings whose key in a `[[model]]` table differs from the key outside: (key outside the tables, key in a table).
const RENAMED_MODEL_KEYS: [(&str, &str); 2] = [("model_name", "name"), ("model_alias", "aliases")];

/// Returns the key of a setting in a `[[model]]` table. `key` is its key outside the tables.
pub(super) fn table_key(key: &str) -> &str {
    let renamed = RENAMED_MODEL_KEYS
        .iter()
        .find(|(outside, _)| *outside == key);
    renamed.map_or(key, |(_, inside)| inside)
}

/// The keys that a settings file may contain.
pub(super) struct KnownKeys {
    /// Keys outside `[[model]]` tables.
    pub(super) top: BTreeSet<String>,
    /// Keys of a `[[model]]` table. Empty if the file must not have any tables.
    pub(super) model: BTreeSet<String>,
}

/// A settings file without unknown keys.
#[derive(Default)]
pub(super) struct SettingsFile {
    /// Entries outside `[[model]]` tables.
    pub(super) top: FileTable,
    /// The `[[model]]` tables.
    pub(super) models: Vec<FileTable>,
    /// The `[[engine]]` and `[[route]]` tables.
    pub(super) cluster: Arc<ClusterFile>,
}

/// The entries of a table, in the order of the file.
#[derive(Clone, Default)]
pub(super) struct FileTable {
    /// Position of the table's header, such as `[[model]]`. `None` for the entries outside the tables.
    pub(super) header: Option<SettingLocation>,
    pub(super) entries: Vec<FileEntry>,
}

/// A key of the settings file with its value.
#[derive(Clone)]
pub(super) struct FileEntry {
    pub(super) key: String,
    pub(super) value: Value,
    pub(super) location: SettingLocation,
}

/// The file, position and name of a setting, for error messages.
#[derive(Clone, Debug)]
pub(super) struct SettingLocation {
    pub(super) path: String,
    pub(super) position: Position,
    /// Name of the setting in errors, such as `slots` or `model[1].slots`.
    pub(super) name: String,
}

impl SettingLocation {
    pub(super) fn error(&self, problem: String) -> FileError {
        FileError {
            path: self.path.clone(),
            position: Some(self.position),
            problem,
        }
    }
}

/// A parsed settings file, with all errors in its syntax and its keys.
pub(super) struct ParsedFile {
    pub(super) file: SettingsFile,
    pub(super) errors: Vec<FileError>,
}

impl ParsedFile {
    /// Reads the file at `path`.
    pub(super) fn read(path: &str, known: &KnownKeys) -> Self {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text, known),
            Err(error) => Self {
                file: SettingsFile::default(),
                errors: vec![FileError {
                    path: path.to_owned(),
                    position: None,
                    problem: error.to_string(),
                }],
            },
        }
    }

    /// Parses the contents of a file. `path` names the file in errors.
    pub(super) fn parse(path: &str, text: &str, known: &KnownKeys) -> Self {
        let mut parser = Parser {
            path,
            text,
            errors: Vec::new(),
        };
        let file = parser.file(known);
        let mut errors = parser.errors;
        errors.sort_by_key(|error| error.position);
        Self { file, errors }
    }

    /// Returns the file if it has no errors.
    ///
    /// # Errors
    /// The first error.
    pub(super) fn valid(self) -> Result<SettingsFile, ConfigError> {
        match self.errors.is_empty() {
            true => Ok(self.file),
            false => Err(first_error(self.errors)),
        }
    }
}

struct Parser<'a> {
    path: &'a str,
    text: &'a str,
    errors: Vec<FileError>,
}

impl Parser<'_> {
    fn file(&mut self, known: &KnownKeys) -> SettingsFile {
        let (spans, errors) = DeTable::parse_recoverable(self.text);
        for error in &errors {
            self.syntax_error(error);
        }
        if !errors.is_empty() {
            return SettingsFile::default();
        }
        let mut values: Table = match self.text.parse() {
            Ok(values) => values,
            Err(error) => {
                self.syntax_error(&error);
                return SettingsFile::default();
            }
        };
        let (mut spans, mut models) = (spans.into_inner(), Vec::new());
        let mut cluster = ClusterFile::default();
        if !known.model.is_empty() {
            let (path, text) = (self.path, self.text);
            cluster = ClusterFile::take_from(&mut spans, &SourceFile { path, text });
        }
        let is_text = values.get(MODEL_TABLES_KEY).is_some_and(Value::is_str);
        if !known.model.is_empty()
            && !is_text
            && let Some((spans, values)) = spans
                .remove(MODEL_TABLES_KEY)
                .zip(values.remove(MODEL_TABLES_KEY))
        {
            models = self.model_tables(spans, values, known);
        }
        let top = self.table(&spans, values, "");
        for unknown in self.unknown_entries(&top, &known.top) {
            let tables = match known.model.is_empty() {
                true => "",
                false => "; known tables are [[model]], [[engine]] and [[route]]",
            };
            let known = comma_separated(&known.top);
            self.errors.push(unknown.location.error(format!(
                "the key '{}' is unknown; known keys are {known}{tables}",
                unknown.location.name
            )));
        }
        SettingsFile {
            top,
            models,
            cluster: Arc::new(cluster),
        }
    }

    fn syntax_error(&mut self, error: &toml::de::Error) {
        let offset = error.span().map_or(0, |span| span.start);
        let position = Position::at(self.text, offset);
        let line = self.text.lines().nth(position.line - 1).unwrap_or_default();
        let message = error.message().replace('\n', ", ");
        self.errors.push(FileError {
            path: self.path.to_owned(),
            position: Some(position),
            problem: format!("{message} in the line '{}'", without_key(line.trim())),
        });
    }

    fn model_tables(
        &mut self,
        spans: Spanned<DeValue<'_>>,
        values: Value,
        known: &KnownKeys,
    ) -> Vec<FileTable> {
        let all = spans.span();
        let (DeValue::Array(spans), Value::Array(values)) = (spans.into_inner(), values) else {
            return self.report_invalid_model_key(all);
        };
        let mut tables = Vec::new();
        for (number, (span, value)) in (1..).zip(spans.into_iter().zip(values)) {
            let header = span.span();
            let (DeValue::Table(spans), Value::Table(value)) = (span.into_inner(), value) else {
                return self.report_invalid_model_key(all);
            };
            let mut table = self.table(&spans, value, &format!("{MODEL_TABLES_KEY}[{number}]."));
            table.header = Some(self.location(header, format!("{MODEL_TABLES_KEY}[{number}]")));
            for unknown in self.unknown_entries(&table, &known.model) {
                let known = comma_separated(&known.model);
                self.errors.push(unknown.location.error(format!(
                    "the key '{}' is unknown; known keys of a model are {known}; server keys must \
                     be above the first [[model]]",
                    unknown.location.name
                )));
            }
            for entry in &mut table.entries {
                let renamed = RENAMED_MODEL_KEYS
                    .iter()
                    .find(|(_, inside)| *inside == entry.key);
                if let Some((outside, _)) = renamed {
                    entry.key = (*outside).to_owned();
                }
            }
            tables.push(table);
        }
        if tables.is_empty() {
            return self.report_invalid_model_key(all);
        }
        tables
    }

    fn report_invalid_model_key(&mut self, span: Range<usize>) -> Vec<FileTable> {
        let location = self.location(span, MODEL_TABLES_KEY.to_owned());
        let problem =
            "model: write the only model as a string, or each model as a table under [[model]]";
        self.errors.push(location.error(problem.to_owned()));
        Vec::new()
    }

    /// Combines the values of a TOML table with their positions in the file. `prefix` is put before each key to name
    /// the setting in errors.
    fn table(&self, spans: &DeTable<'_>, mut values: Table, prefix: &str) -> FileTable {
        let mut entries: Vec<_> = spans
            .keys()
            .map(|key| (key.span(), key.get_ref()))
            .collect();
        entries.sort_by_key(|(span, _)| span.start);
        let entries = entries.into_iter().filter_map(|(span, key)| {
            Some(FileEntry {
                key: key.to_string(),
                value: values.remove(&**key)?,
                location: self.location(span, format!("{prefix}{key}")),
            })
        });
        FileTable {
            header: None,
            entries: entries.collect(),
        }
    }

    fn unknown_entries(&self, table: &FileTable, known: &BTreeSet<String>) -> Vec<FileEntry> {
        let entries = table.entries.iter();
        let unknown = entries.filter(|entry| !known.contains(&entry.key));
        unknown.cloned().collect()
    }

    fn location(&self, span: Range<usize>, name: String) -> SettingLocation {
        SettingLocation {
            path: self.path.to_owned(),
            position: Position::at(self.text, span.start),
            name,
        }
    }
}

/// Returns a line for an error message. If the line may contain a key for an engine, only its start is shown.
fn without_key(line: &str) -> String {
    let name = line.to_ascii_lowercase().find("key");
    let value = name.and_then(|at| Some(at + line[at..].find('=')? + 1));
    value.map_or_else(|| line.to_owned(), |at| format!("{} …", &line[..at]))
}

fn comma_separated(keys: &BTreeSet<String>) -> String {
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    keys.join(", ")
}
