//! API keys: their file, the commands that change it, and the keys in force. This module must not know how a request
//! carries its key, or which route needs which scope.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

mod bucket;
mod command;
mod edit;
mod file;
mod key;
mod limits;
mod secret;
mod set;

pub(crate) use bucket::RateStatus;
pub use command::{KeysCommand, KeysCommandError, KeysOutput};
pub use file::KeysFileError;
use file::{ParsedKeys, read_keys};
pub use key::{InvalidKeyName, InvalidScope, Key, KeyName, Scope};
pub use limits::KeyLimits;
pub(crate) use limits::LimitedRequest;
use limits::Quotas;
pub(crate) use secret::SecretHash;
use set::{KeyEntry, KeySet, StoredSecret};

use crate::watched_files::WatchedFiles;

/// Name of the key that comes from an environment variable.
const VARIABLE_KEY_NAME: &str = "environment";

/// Sources of the keys that a server accepts.
#[derive(Clone)]
pub struct KeySources {
    /// Path of the keys file.
    pub(crate) file: Option<PathBuf>,
    /// Hash of the key from the environment. This key has every scope.
    pub(crate) variable: Option<SecretHash>,
}

impl KeySources {
    /// Reads the keys. The requests of the `previous` keys still count toward the limits.
    fn read(&self, previous: &KeySet) -> Result<KeySet, KeysFileError> {
        let in_file = self.file.as_deref().map(read_keys).transpose()?;
        let ParsedKeys { keys, limits } = in_file.unwrap_or_default();
        let variable = self.variable.map(|hash| KeyEntry {
            key: Arc::new(Key {
                name: VARIABLE_KEY_NAME.parse().expect("the name is valid"),
                scopes: Scope::ALL.into(),
                models: None,
                quotas: Quotas::default(),
            }),
            secrets: vec![StoredSecret {
                hash,
                expires: None,
            }],
        });
        let entries = keys.into_iter().chain(variable);
        Ok(KeySet::new(entries.collect(), limits, previous))
    }
}

/// The keys in force. Clones share them.
#[derive(Clone)]
pub struct Keys(Arc<Shared>);

struct Shared {
    sources: KeySources,
    /// The keys file, as it was before it was first read.
    files_at_start: WatchedFiles,
    set: RwLock<Arc<KeySet>>,
    /// Held while the keys are reloaded, so that an older version of the file never replaces a newer one.
    reloading: Mutex<()>,
}

impl Keys {
    /// Reads the keys.
    ///
    /// # Errors
    /// The keys file cannot be read, or is invalid.
    pub fn read(sources: KeySources) -> Result<Self, KeysFileError> {
        let files_at_start = WatchedFiles::new(sources.file.clone());
        let set = RwLock::new(Arc::new(sources.read(&KeySet::default())?));
        Ok(Self(Arc::new(Shared {
            sources,
            files_at_start,
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
        let set = Arc::new(self.0.sources.read(&self.set())?);
        let count = set.len();
        *self.0.set.write().unwrap_or_else(PoisonError::into_inner) = set;
        Ok(count)
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
