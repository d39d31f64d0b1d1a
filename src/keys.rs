//! API keys: their file, the commands that change it, and the keys in force. This module must not know how a request
//! carries its key, or which route needs which scope.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

mod bucket;
mod budget;
mod command;
mod document;
mod edit;
mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod key;
mod limits;
mod secret;
mod set;
mod usage_file;
mod usage_store;
mod weight;

pub(crate) use bucket::RateStatus;
pub use budget::{Budget, BudgetPeriod, BudgetUnit};
pub(crate) use budget::{KeyBudgets, Reservation, TokenCount, TokenNeed};
pub use command::{KeysCommand, KeysCommandError, KeysOutput};
pub use file::KeysFileError;
use file::{ParsedKeys, read_keys};
pub use key::{InvalidKeyName, InvalidScope, Key, KeyName, Scope};
pub use limits::KeyLimits;
pub(crate) use limits::LimitedRequest;
use limits::Quotas;
pub use secret::{InvalidHash, SecretHash};
use set::{KeyEntry, KeySet, StoredSecret};
pub use usage_file::UsageFileError;
use usage_store::UsageStore;
pub use weight::{InvalidWeight, Weight};

use crate::watched_files::WatchedFiles;

/// Name of the key that comes from an environment variable.
const VARIABLE_KEY_NAME: &str = "environment";

/// Sources of the keys that a server accepts.
#[derive(Clone)]
pub struct KeySources {
    /// Path of the keys file.
    pub file: Option<PathBuf>,
    /// Hash of the key from the environment. This key has every scope.
    pub variable: Option<SecretHash>,
    /// Path of the file that stores the usage of token budgets.
    pub usage_file: Option<PathBuf>,
}

/// Error that makes the keys unusable.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The keys file cannot be read, or is invalid.
    #[error(transparent)]
    File(#[from] KeysFileError),
    /// The usage file cannot be read or written, or is invalid.
    #[error(transparent)]
    Usage(#[from] UsageFileError),
}

impl KeySources {
    /// Reads the keys. `usage` has their earlier usage of limits and budgets.
    fn read(&self, usage: &UsageStore) -> Result<KeySet, KeysFileError> {
        let in_file = self.file.as_deref().map(|path| {
            let parsed = read_keys(path)?;
            check_usage_is_stored(path, &parsed, usage)?;
            Ok(parsed)
        });
        let ParsedKeys { keys, limits } = in_file.transpose()?.unwrap_or_default();
        let variable = self.variable.map(|hash| KeyEntry {
            key: Arc::new(Key {
                name: VARIABLE_KEY_NAME.parse().expect("the name is valid"),
                scopes: Scope::ALL.into(),
                models: None,
                weight: Weight::default(),
                quotas: Quotas::default(),
                budgets: KeyBudgets::default(),
            }),
            secrets: vec![StoredSecret {
                hash,
                expires: None,
            }],
        });
        let entries = keys.into_iter().chain(variable);
        Ok(KeySet::new(entries.collect(), limits, usage))
    }
}

/// Checks that a usage file is set if a key has a budget.
fn check_usage_is_stored(
    path: &Path,
    parsed: &ParsedKeys,
    usage: &UsageStore,
) -> Result<(), KeysFileError> {
    let mut keys = parsed.keys.iter().map(|entry| &entry.key);
    match keys.find(|key| !key.budgets.budgets.is_empty()) {
        Some(key) if !usage.has_file() => {
            let name = &key.name;
            let problem = format!(
                "the key {name} has a budget; set --usage-file to the path of a file in which the server can store \
                 the usage of budgets"
            );
            Err(KeysFileError::new(path, problem))
        }
        Some(_) | None => Ok(()),
    }
}

/// The keys in force. Clones share them.
#[derive(Clone)]
pub struct Keys(Arc<Shared>);

struct Shared {
    sources: KeySources,
    /// The keys file, as it was before it was first read.
    files_at_start: WatchedFiles,
    usage: UsageStore,
    set: RwLock<Arc<KeySet>>,
    /// Held while the keys are reloaded, so that an older version of the file never replaces a newer one.
    reloading: Mutex<()>,
}

impl Keys {
    /// Reads the keys, and the stored usage of their budgets.
    ///
    /// # Errors
    /// The keys file or the usage file cannot be used.
    pub fn read(sources: KeySources) -> Result<Self, KeysError> {
        let files_at_start = WatchedFiles::new(sources.file.clone());
        let usage = UsageStore::open(sources.usage_file.as_deref())?;
        let set = RwLock::new(Arc::new(sources.read(&usage)?));
        Ok(Self(Arc::new(Shared {
            sources,
            files_at_start,
            usage,
            set,
            reloading: Mutex::new(()),
        })))
    }

    /// Reads the keys again. Running requests are not affected. Returns the number of keys.
    ///
    /// # Errors
    /// The keys file cannot be read, or is invalid. The keys in force stay.
    pub fn reload(&self) -> Result<usize, KeysFileError> {
        let reloading = &self.0.reloading;
        let _reloading = reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let set = Arc::new(self.0.sources.read(&self.0.usage)?);
        let count = set.len();
        *self.0.set.write().unwrap_or_else(PoisonError::into_inner) = set;
        Ok(count)
    }

    /// Stores the usage of budgets if it has changed since the last write. Returns the number of tokens that all keys
    /// together have ever used, or `None` if nothing was written.
    ///
    /// # Errors
    /// The usage file cannot be written.
    pub(crate) fn store_usage(&self) -> Result<Option<u64>, UsageFileError> {
        self.0.usage.write()
    }

    /// Returns true if the usage of budgets is stored in a file.
    pub(crate) fn has_usage_file(&self) -> bool {
        self.0.usage.has_file()
    }

    /// Returns the key with this secret, if it is in force now.
    #[must_use]
    pub fn find(&self, secret: &[u8]) -> Option<Arc<Key>> {
        self.set().find(secret, SystemTime::now()).cloned()
    }

    /// Returns the number of keys in force, including those that have expired.
    pub(crate) fn count(&self) -> usize {
        self.set().len()
    }

    fn set(&self) -> Arc<KeySet> {
        Arc::clone(&self.0.set.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the keys file, if there is one, as it was before it was first read.
    pub(crate) fn files_at_start(&self) -> WatchedFiles {
        self.0.files_at_start.clone()
    }

    /// Returns the path of the keys file.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.0.sources.file.as_deref()
    }
}
