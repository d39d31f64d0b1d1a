//! Fuzz target of the keys file, and of the changes that `tokenway keys` makes to it.

use std::path::Path;
use std::time::SystemTime;

use jiff::Timestamp;

use super::budget::{Budget, BudgetAmount, BudgetUnit};
use super::document::{EditError, KeysDocument, NewKey, Rotation};
use super::file::{ParsedKeys, parse_keys};
use super::key::{KeyName, Scope};
use super::limits::KeyLimits;
use super::secret::SecretHash;
use super::set::KeyEntry;
use super::weight::Weight;

/// A change of a document.
type Change<'a> = &'a dyn Fn(&mut KeysDocument) -> Result<(), EditError>;

/// Input: a keys file. An accepted file can be changed, and a change keeps the limits and all other keys.
pub(crate) fn keys_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match parse_keys(path(), text) {
        Ok(parsed) => check_changes(text, &Facts::of(&parsed)),
        Err(error) => assert!(error.to_string().starts_with("keys file keys.toml")),
    }
}

fn path() -> &'static Path {
    Path::new("keys.toml")
}

fn check_changes(text: &str, before: &Facts) {
    let name: KeyName = "added-by-the-test".parse().expect("the name is valid");
    let (first, second) = (SecretHash::of(b"first"), SecretHash::of(b"second"));
    if before.keys.iter().all(|key| key.name != name.as_str()) {
        let added = changed(text, &|document| document.add(&new_key(&name), &first));
        let mut expected = before.clone();
        expected.keys.push(KeyFacts {
            name: name.to_string(),
            scopes: vec![Scope::Inference],
            models: None,
            weight: Weight::default(),
            limits: KeyLimits::default(),
            budgets: vec![budget()],
            secrets: vec![(first.to_string(), None)],
        });
        assert_eq!(facts(&added), expected, "\n{added}");
        let removed = changed(&added, &|document| document.remove(&name));
        assert_eq!(&facts(&removed), before, "\n{removed}");
    }
    for (at, key) in before.keys.iter().enumerate().take(4) {
        let name: KeyName = key.name.parse().expect("the name is valid");
        let removed = facts(&changed(text, &|document| document.remove(&name)));
        let mut expected = before.clone();
        expected.keys.remove(at);
        assert_eq!(removed, expected);

        let rotated = changed(text, &|document| {
            document.rotate(&name, &rotation(), &second)
        });
        let mut rotated = facts(&rotated);
        let newest = rotated.keys[at].secrets.pop();
        assert_eq!(newest, Some((second.to_string(), None)));
        let latest = Some(rotation().old_expire.into());
        let secrets = &rotated.keys[at].secrets;
        assert!(
            secrets
                .iter()
                .all(|(_, expires)| expires.is_some() && *expires <= latest)
        );
        assert!(
            secrets
                .iter()
                .all(|(hash, _)| key.secrets.iter().any(|(old, _)| old == hash))
        );
        rotated.keys[at].secrets.clone_from(&key.secrets);
        assert_eq!(&rotated, before);
    }
}

fn changed(text: &str, change: Change<'_>) -> String {
    let document = KeysDocument::parse(path(), text);
    let mut document = document.unwrap_or_else(|error| panic!("{error} in\n{text}"));
    change(&mut document).unwrap_or_else(|error| panic!("{error} in\n{text}"));
    let changed = document.into_text(path());
    changed.unwrap_or_else(|error| panic!("{error} after a change of\n{text}"))
}

fn new_key(name: &KeyName) -> NewKey {
    NewKey {
        name: name.clone(),
        scopes: [Scope::Inference].into(),
        models: [].into(),
        weight: Weight::default(),
        limits: KeyLimits::default(),
        budgets: vec![budget()],
        expires: None,
    }
}

fn budget() -> Budget {
    let amount: BudgetAmount = "1000/day".parse().expect("the amount is valid");
    amount.of(BudgetUnit::Tokens)
}

fn rotation() -> Rotation {
    let at = |seconds| Timestamp::from_second(seconds).expect("the time is in range");
    Rotation {
        old_expire: at(1_800_000_000),
        new_expires: None,
        now: at(1_700_000_000),
    }
}

/// The contents of a keys file, in a form that can be compared.
#[derive(Clone, Debug, PartialEq)]
struct Facts {
    limits: KeyLimits,
    keys: Vec<KeyFacts>,
}

#[derive(Clone, Debug, PartialEq)]
struct KeyFacts {
    name: String,
    scopes: Vec<Scope>,
    models: Option<Vec<String>>,
    weight: Weight,
    limits: KeyLimits,
    budgets: Vec<Budget>,
    /// Hash and expiry of each secret.
    secrets: Vec<(String, Option<SystemTime>)>,
}

fn facts(text: &str) -> Facts {
    let parsed = parse_keys(path(), text);
    Facts::of(&parsed.unwrap_or_else(|error| panic!("{error} in\n{text}")))
}

impl Facts {
    fn of(parsed: &ParsedKeys) -> Self {
        Self {
            limits: parsed.limits,
            keys: parsed.keys.iter().map(KeyFacts::of).collect(),
        }
    }
}

impl KeyFacts {
    fn of(entry: &KeyEntry) -> Self {
        let key = &entry.key;
        let secrets = entry.secrets.iter();
        Self {
            name: key.name.to_string(),
            scopes: key.scopes.iter().copied().collect(),
            models: key.models.as_ref().map(|it| it.iter().cloned().collect()),
            weight: key.weight,
            limits: key.quotas.of_key.limits,
            budgets: key.budgets.budgets.to_vec(),
            secrets: secrets
                .map(|secret| (secret.hash.to_string(), secret.expires))
                .collect(),
        }
    }
}
