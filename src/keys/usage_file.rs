//! The file in which a server stores the usage of token budgets. This module must not know when the file is written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::budget::UsageRecord;

/// Version of the format.
const VERSION: u32 = 1;

/// Usage of keys, by their names.
pub(super) type StoredUsage = BTreeMap<String, UsageRecord>;

/// Error for a usage file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("usage file {path}: {problem}")]
pub struct UsageFileError {
    path: String,
    problem: String,
}

impl UsageFileError {
    pub(super) fn new(path: &Path, problem: impl Display) -> Self {
        Self {
            path: path.display().to_string(),
            problem: problem.to_string(),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents<'a> {
    version: u32,
    keys: Cow<'a, StoredUsage>,
}

/// The usage file of a running server. Only one server can have it open.
#[derive(Debug)]
pub(super) struct UsageFile {
    path: PathBuf,
    /// A locked file beside the usage file. The usage file itself cannot be locked, because each write replaces it.
    _lock: File,
}

impl UsageFile {
    /// Opens the file, and reads the stored usage. Creates the file if it does not exist.
    ///
    /// # Errors
    /// The file cannot be read or written, is invalid, or another server has it open.
    pub(super) fn open(path: &Path) -> Result<(Self, StoredUsage), UsageFileError> {
        let failed = |error: io::Error| UsageFileError::new(path, error);
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = File::create(&lock_path).map_err(failed)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                UsageFileError::new(path, "another server uses it; each server needs its own")
            }
            TryLockError::Error(error) => failed(error),
        })?;
        let usage = match std::fs::read(path) {
            Ok(text) => parse(&text).map_err(|problem| UsageFileError::new(path, problem))?,
            Err(error) if error.kind() == ErrorKind::NotFound => StoredUsage::new(),
            Err(error) => return Err(failed(error)),
        };
        let file = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        // A test write, so that the server does not start with a file that cannot be written.
        file.write(&usage)?;
        Ok((file, usage))
    }

    /// Replaces the contents of the file in one step.
    ///
    /// # Errors
    /// The file cannot be written. It keeps its previous contents.
    pub(super) fn write(&self, usage: &StoredUsage) -> Result<(), UsageFileError> {
        let contents = Contents {
            version: VERSION,
            keys: Cow::Borrowed(usage),
        };
        let folder = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        let folder = folder.unwrap_or_else(|| Path::new("."));
        let written = (|| {
            let mut file = NamedTempFile::new_in(folder)?;
            serde_json::to_writer_pretty(&mut file, &contents)?;
            file.write_all(b"\n")?;
            file.as_file().sync_all()?;
            file.persist(&self.path)?;
            File::open(folder)?.sync_all()
        })();
        written.map_err(|error: io::Error| UsageFileError::new(&self.path, error))
    }
}

fn parse(text: &[u8]) -> Result<StoredUsage, String> {
    let contents: Contents<'_> = serde_json::from_slice(text).map_err(|it| it.to_string())?;
    match contents.version {
        VERSION => Ok(contents.keys.into_owned()),
        version => Err(format!(
            "its version is {version}, and this server reads version {VERSION}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::date;

    use super::*;
    use crate::keys::budget::TokenCount;

    fn usage() -> StoredUsage {
        let tokens = |prompt, completion| TokenCount { prompt, completion };
        let record = UsageRecord {
            date: date(2026, 12, 1),
            day: tokens(1, 2),
            month: tokens(3, 4),
            total: tokens(5, 6),
        };
        [("a".to_owned(), record)].into()
    }

    #[test]
    fn the_file_has_what_was_written_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.json");
        let (file, stored) = UsageFile::open(&path).unwrap();
        assert_eq!(stored, StoredUsage::new());
        file.write(&usage()).unwrap();
        drop(file);
        assert_eq!(UsageFile::open(&path).unwrap().1, usage());
    }

    #[test]
    fn a_file_belongs_to_one_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.json");
        let (first, _) = UsageFile::open(&path).unwrap();
        let error = UsageFile::open(&path).unwrap_err().to_string();
        assert!(error.ends_with("another server uses it; each server needs its own"));
        drop(first);
        UsageFile::open(&path).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_used_is_an_error_and_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("usage.json");
        for (text, expected) in [
            ("", "EOF while parsing"),
            ("{\"version\": 2, \"keys\": {}}", "its version is 2"),
            (
                "{\"version\": 1, \"keys\": {\"a\": {}}}",
                "missing field `date`",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = UsageFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        let missing = folder.path().join("missing/usage.json");
        UsageFile::open(&missing).unwrap_err();
    }
}
