//! The usage of limits and budgets by the keys of a server. The usage outlives the keys, which are replaced whenever
//! their file changes. This module must not know the keys file.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::budget::{BudgetUsage, today};
use super::key::KeyName;
use super::limits::KeyUsage;
use super::usage_file::{StoredUsage, UsageFile, UsageFileError};

/// Usage of limits and budgets, by key.
#[derive(Debug, Default)]
pub(super) struct UsageStore {
    by_key: Mutex<HashMap<KeyName, UsageOfKey>>,
    /// Usage of all keys together.
    pub(super) of_all: Arc<KeyUsage>,
    /// The file that stores the usage of budgets. `None` if no key may have a budget.
    file: Option<OpenFile>,
}

/// Usage of one key.
#[derive(Clone, Debug, Default)]
pub(super) struct UsageOfKey {
    pub(super) of_limits: Arc<KeyUsage>,
    pub(super) of_budgets: Arc<BudgetUsage>,
}

#[derive(Debug)]
struct OpenFile {
    file: UsageFile,
    /// Usage that the file contains.
    written: Mutex<StoredUsage>,
}

impl UsageStore {
    /// Opens the usage file, if a path is given, and restores the stored usage.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(super) fn open(path: Option<&Path>) -> Result<Self, UsageFileError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let (file, usage) = UsageFile::open(path)?;
        let mut by_key = HashMap::new();
        for (name, record) in &usage {
            let name = name.parse().map_err(|problem| {
                UsageFileError::new(path, format!("the name of a key {problem}"))
            })?;
            let restored = UsageOfKey {
                of_budgets: Arc::new(BudgetUsage::restore(record)),
                ..UsageOfKey::default()
            };
            by_key.insert(name, restored);
        }
        Ok(Self {
            by_key: Mutex::new(by_key),
            of_all: Arc::default(),
            file: Some(OpenFile {
                file,
                written: Mutex::new(usage),
            }),
        })
    }

    /// Returns the usage of the key with this name. A new key with an earlier key's name continues the earlier usage.
    pub(super) fn of_key(&self, name: &KeyName) -> UsageOfKey {
        self.lock().entry(name.clone()).or_default().clone()
    }

    /// Returns true if the usage of budgets is stored.
    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Writes the usage of budgets if it has changed since the last write. Returns the number of tokens that all keys
    /// together have ever used, or `None` if nothing was written.
    ///
    /// # Errors
    /// The file cannot be written. It keeps its previous contents.
    pub(super) fn write(&self) -> Result<Option<u64>, UsageFileError> {
        let Some(OpenFile { file, written }) = &self.file else {
            return Ok(None);
        };
        let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = self.records();
        if usage == *written {
            return Ok(None);
        }
        file.write(&usage)?;
        let tokens = usage.values().map(|record| record.total.sum());
        let tokens = tokens.fold(0, u64::saturating_add);
        *written = usage;
        Ok(Some(tokens))
    }

    fn records(&self) -> StoredUsage {
        let today = today();
        let by_key = self.lock();
        let records = by_key.iter().filter_map(|(name, usage)| {
            let record = usage.of_budgets.record(today)?;
            Some((name.to_string(), record))
        });
        records.collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyName, UsageOfKey>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
