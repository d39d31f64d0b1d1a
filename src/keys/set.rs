//! The keys that a server accepts at one time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::key::Key;
use super::limits::{KeyLimits, Quota};
use super::secret::SecretHash;
use super::usage_store::UsageStore;

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
    /// Number of keys.
    keys: usize,
}

impl KeySet {
    /// Creates the set of these keys. `limits` apply to all of them together. `usage` has their earlier usage.
    pub(super) fn new(entries: Vec<KeyEntry>, limits: KeyLimits, usage: &UsageStore) -> Self {
        let mut set = Self {
            keys: entries.len(),
            ..Self::default()
        };
        let of_all = Quota {
            limits,
            usage: Arc::clone(&usage.of_all),
        };
        for KeyEntry { mut key, secrets } in entries {
            let new = Arc::get_mut(&mut key).expect("a new key is not shared yet");
            let usage = usage.of_key(&new.name);
            new.quotas.of_all = of_all.clone();
            new.quotas.of_key.usage = usage.of_limits;
            new.budgets.usage = usage.of_budgets;
            for secret in secrets {
                let found = set.secrets.entry(secret.hash.index()).or_default();
                found.push((secret, Arc::clone(&key)));
            }
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
        self.keys
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::keys::budget::KeyBudgets;
    use crate::keys::limits::Quotas;
    use crate::keys::{Scope, Weight};

    fn entry(name: &str, secrets: &[(&str, Option<SystemTime>)]) -> KeyEntry {
        let key = Key {
            name: name.parse().unwrap(),
            scopes: [Scope::Inference].into(),
            models: None,
            weight: Weight::default(),
            quotas: Quotas::default(),
            budgets: KeyBudgets::default(),
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
        let set = KeySet::new(entries, KeyLimits::default(), &UsageStore::default());
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
    fn a_reloaded_key_keeps_the_use_of_its_limits_and_budgets() {
        let (limits, store) = (KeyLimits::default(), UsageStore::default());
        let set = KeySet::new(vec![entry("a", &[("a", None)])], limits, &store);
        let without = KeySet::new(vec![entry("b", &[("b", None)])], limits, &store);
        let again = KeySet::new(vec![entry("a", &[("a", None)])], limits, &store);
        let usage = |set: &KeySet, secret: &str| {
            let key = set.find(secret.as_bytes(), SystemTime::now()).unwrap();
            let of_limits = Arc::as_ptr(&key.quotas.of_key.usage);
            (of_limits, Arc::as_ptr(&key.budgets.usage))
        };
        assert_eq!(usage(&again, "a"), usage(&set, "a"));
        assert_ne!(usage(&without, "b"), usage(&set, "a"));
        let of_all = |set: &KeySet, secret: &str| {
            let key = set.find(secret.as_bytes(), SystemTime::now()).unwrap();
            Arc::as_ptr(&key.quotas.of_all.usage)
        };
        assert_eq!(of_all(&without, "b"), of_all(&set, "a"));
    }
}
