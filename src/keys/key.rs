//! A key: its name, and what requests with it may do. It does not contain the secret.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::budget::KeyBudgets;
use super::limits::Quotas;
use super::weight::Weight;

/// Maximum length of a key's name, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A key as requests see it. It does not contain the key's secrets.
#[derive(Debug)]
pub struct Key {
    /// Name of the key.
    pub name: KeyName,
    /// What requests with this key may do.
    pub scopes: BTreeSet<Scope>,
    /// Names of the models that requests with this key may use; `None` for all models.
    pub models: Option<BTreeSet<String>>,
    /// The key's share of slots and queue, relative to other keys.
    pub weight: Weight,
    /// Limits of the requests with this key, and what they have used. A reload keeps the usage of a key whose name
    /// stays.
    pub(crate) quotas: Quotas,
    /// Token budgets of the key, and their usage. A reload keeps the usage, too.
    pub(crate) budgets: KeyBudgets,
}

impl Key {
    /// Returns true if the key has this scope. `admin` includes `metrics`.
    #[must_use]
    pub fn has_scope(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
            || (scope == Scope::Metrics && self.scopes.contains(&Scope::Admin))
    }

    /// Returns true if requests with this key may use the model that has one of these names.
    #[must_use]
    pub fn allows_model<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> bool {
        match &self.models {
            None => true,
            Some(models) => names.any(|name| models.contains(name)),
        }
    }
}

/// Name of a key. It identifies the caller in the log and in metrics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyName(Arc<str>);

impl KeyName {
    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Error for a text that cannot be the name of a key.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to {MAX_NAME_BYTES} of the characters a-z, A-Z, 0-9, `.`, `_` and `-`")]
pub struct InvalidKeyName;

impl FromStr for KeyName {
    type Err = InvalidKeyName;

    fn from_str(name: &str) -> Result<Self, InvalidKeyName> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_valid = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_allowed);
        is_valid.then(|| Self(name.into())).ok_or(InvalidKeyName)
    }
}

/// Permission of a key: a group of routes, or priorities that apply across keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Completions, tokenizers and lists of models.
    Inference,
    /// `/metrics`.
    Metrics,
    /// Everything that an operator does, including `/metrics`.
    Admin,
    /// Priorities that apply to the requests of all keys, not only of the same key.
    Priority,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 4] = [Self::Inference, Self::Metrics, Self::Admin, Self::Priority];

    /// Returns the name of the scope in the keys file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
            Self::Priority => "priority",
        }
    }
}

/// Error for a text that is not the name of a scope.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be inference, metrics, admin or priority")]
pub struct InvalidScope;

impl FromStr for Scope {
    type Err = InvalidScope;

    fn from_str(text: &str) -> Result<Self, InvalidScope> {
        let mut all = Self::ALL.into_iter();
        all.find(|scope| scope.name() == text).ok_or(InvalidScope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(scopes: &[Scope], models: Option<&[&str]>) -> Key {
        Key {
            name: "a".parse().unwrap(),
            scopes: scopes.iter().copied().collect(),
            models: models.map(|models| models.iter().map(|&it| it.to_owned()).collect()),
            weight: Weight::default(),
            quotas: Quotas::default(),
            budgets: KeyBudgets::default(),
        }
    }

    #[test]
    fn the_scope_admin_includes_metrics_but_no_completions() {
        let admin = key(&[Scope::Admin], None);
        assert!(admin.has_scope(Scope::Admin) && admin.has_scope(Scope::Metrics));
        assert!(!admin.has_scope(Scope::Inference));
        assert!(!key(&[Scope::Metrics], None).has_scope(Scope::Admin));
    }

    #[test]
    fn a_key_allows_a_model_by_its_name_or_an_alias() {
        let names = || ["chat", "gpt-4o"].into_iter();
        assert!(key(&[], None).allows_model(names()));
        assert!(key(&[], Some(&["gpt-4o"])).allows_model(names()));
        assert!(!key(&[], Some(&["other"])).allows_model(names()));
        assert!(!key(&[], Some(&[])).allows_model(names()));
    }

    #[test]
    fn a_name_has_no_characters_that_a_log_would_have_to_quote() {
        for name in ["a", "alice-2.eu_west", &"a".repeat(64)] {
            assert!(name.parse::<KeyName>().is_ok(), "{name}");
        }
        for name in ["", "a b", "a\n", "é", "a\"", &"a".repeat(65)] {
            assert_eq!(name.parse::<KeyName>(), Err(InvalidKeyName), "{name}");
        }
    }
}
