//! The keys that a server accepts at one time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::key::{Key, KeyName};
use super::limits::{KeyLimits, Quota};
use super::secret::SecretHash;

/// A key with its stored secrets.
#[derive(Clone)]
pub(crate) struct KeyEntry {
    pub(crate) key: Arc<Key>,
    pub(crate) secrets: Vec<StoredSecret>,
}

/// Hash of a secret, and the time until which the secret is valid.
#[derive(Clone, Copy)]
pub(crate) struct StoredSecret {
    pub(crate) hash: SecretHash,
    /// `None` for a secret that does not expire.
    pub(crate) expires: Option<SystemTime>,
}

/// Keys that can be found by their secrets.
#[derive(Default)]
pub(crate) struct KeySet {
    secrets: HashMap<[u8; 8], Vec<(StoredSecret, Arc<Key>)>>,
    keys: HashMap<KeyName, Arc<Key>>,
    of_all: Quota,
}

impl KeySet {
    /// Creates the set of these keys. `limits` apply to all of them together. A key keeps the usage of
    /// the `previous` key with its name. The limits of all keys keep theirs.
    pub(crate) fn new(entries: Vec<KeyEntry>, limits: KeyLimits, previous: &Self) -> Self {
        let mut set = Self {
            of_all: Quota {
                limits,
                usage: Arc::clone(&previous.of_all.usage),
            },
            ..Self::default()
        };
        for KeyEntry { mut key, secrets } in entries {
            let new = Arc::get_mut(&mut key).expect("a new key is not shared yet");
            new.quotas.of_all = set.of_all.clone();
            if let Some(previous) = previous.keys.get(&new.name) {
                new.quotas.of_key.usage = Arc::clone(&previous.quotas.of_key.usage);
            }
            for secret in secrets {
                let found = set.secrets.entry(secret.hash.index()).or_default();
                found.push((secret, Arc::clone(&key)));
            }
            set.keys.insert(key.name.clone(), key);
        }
        set
    }

    /// Returns the key with this secret, if the secret has not expired.
    pub(crate) fn find(&self, secret: &[u8], now: SystemTime) -> Option<&Arc<Key>> {
        let hash = SecretHash::of(secret);
        let candidates = self.secrets.get(&hash.index())?;
        let (stored, key) = candidates
            .iter()
            .find(|(stored, _)| stored.hash.matches(&hash))?;
        let is_valid = stored.expires.is_none_or(|expires| now < expires);
        is_valid.then_some(key)
    }

    /// Returns the number of keys.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::keys::Scope;
    use crate::keys::limits::Quotas;

    fn entry(name: &str, secrets: &[(&str, Option<SystemTime>)]) -> KeyEntry {
        let key = Key {
            name: name.parse().unwrap(),
            scopes: [Scope::Inference].into(),
            models: None,
            quotas: Quotas::default(),
        };
        let secrets = secrets.iter().map(|(secret, expires)| StoredSecret {
            hash: SecretHash::of(secret.as_bytes()),
            expires: *expires,
        });
        KeyEntry {
            key: Arc::new(key),
            secrets: secrets.collect(),
        }
    }

    #[test]
    fn a_key_is_found_by_each_of_its_secrets_until_the_secret_expires() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let second = Duration::from_secs(1);
        let (past, future) = (Some(now - second), Some(now + second));
        let entries = vec![
            entry("a", &[("a-old", future), ("a-new", None)]),
            entry("b", &[("b", past), ("b-now", Some(now))]),
        ];
        let set = KeySet::new(entries, KeyLimits::default(), &KeySet::default());
        let name = |secret: &str| {
            let found = set.find(secret.as_bytes(), now);
            found.map(|key| key.name.as_str().to_owned())
        };
        assert_eq!(name("a-old").as_deref(), Some("a"));
        assert_eq!(name("a-new").as_deref(), Some("a"));
        for secret in ["b", "b-now", "", "a-ol", "a-oldx"] {
            assert_eq!(name(secret), None, "{secret}");
        }
        assert_eq!(set.len(), 2);
    }

    #[test]
    fn a_reloaded_key_keeps_the_use_of_its_limits() {
        let limits = KeyLimits::default();
        let entries = vec![entry("a", &[]), entry("b", &[])];
        let set = KeySet::new(entries, limits, &KeySet::default());
        let reloaded = KeySet::new(vec![entry("a", &[]), entry("c", &[])], limits, &set);
        let usage = |set: &KeySet, name: &str| {
            let key = &set.keys[&name.parse::<KeyName>().unwrap()];
            Arc::as_ptr(&key.quotas.of_key.usage)
        };
        assert_eq!(usage(&reloaded, "a"), usage(&set, "a"));
        assert_ne!(usage(&reloaded, "c"), usage(&set, "b"));
        let of_all = |set: &KeySet| Arc::as_ptr(&set.of_all.usage);
        assert_eq!(of_all(&reloaded), of_all(&set));
    }
}
