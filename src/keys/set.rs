//! The keys that a server accepts at one time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::key::Key;
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
    key_count: usize,
}

impl KeySet {
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
        self.key_count
    }
}

impl FromIterator<KeyEntry> for KeySet {
    fn from_iter<I: IntoIterator<Item = KeyEntry>>(entries: I) -> Self {
        let mut set = Self::default();
        for KeyEntry { key, secrets } in entries {
            set.key_count += 1;
            for secret in secrets {
                let found = set.secrets.entry(secret.hash.index()).or_default();
                found.push((secret, Arc::clone(&key)));
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::keys::Scope;

    fn entry(name: &str, secrets: &[(&str, Option<SystemTime>)]) -> KeyEntry {
        let key = Key {
            name: name.parse().unwrap(),
            scopes: [Scope::Inference].into(),
            models: None,
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
        let set: KeySet = [
            entry("a", &[("a-old", future), ("a-new", None)]),
            entry("b", &[("b", past), ("b-now", Some(now))]),
        ]
        .into_iter()
        .collect();
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
}
