//! The keys file: TOML with one `[[key]]` table per key.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Display;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer};
use toml::value::Datetime;

use super::VARIABLE_KEY_NAME;
use super::budget::{Budget, BudgetPeriod, BudgetUnit, KeyBudgets};
use super::key::{Key, KeyName, Scope};
use super::limits::{KeyLimits, Quota, Quotas};
use super::secret::SecretHash;
use super::set::{KeyEntry, StoredSecret};
use super::weight::Weight;

/// Error for a keys file that cannot be used. It repeats no value of the file, because an operator may have written a
/// key there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("keys file {path}{}: {problem}", line_suffix(*line))]
pub struct KeysFileError {
    path: String,
    /// Number of the line, from 1; `None` if the error concerns the whole file.
    line: Option<usize>,
    problem: String,
}

impl KeysFileError {
    /// Creates an error about a whole file.
    pub(super) fn new(path: &Path, problem: impl Display) -> Self {
        Self {
            path: path.display().to_string(),
            line: None,
            problem: problem.to_string(),
        }
    }
}

fn line_suffix(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(":{line}"))
}

/// The contents of a keys file.
#[derive(Default)]
pub(crate) struct ParsedKeys {
    pub(crate) keys: Vec<KeyEntry>,
    /// Limits of the requests of all keys together.
    pub(crate) limits: KeyLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysTable {
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    key: Vec<KeyTable>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    requests_per_minute: Option<Limit>,
    concurrent_requests: Option<Limit>,
    tokens_per_minute: Option<Limit>,
}

struct Limit(NonZeroU32);

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        let limit = u32::try_from(number).ok().and_then(NonZeroU32::new);
        let problem = "must be a whole number from 1 to 4294967295";
        limit
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(problem))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyTable {
    name: Parsed<KeyName>,
    #[serde(default = "default_scopes")]
    scopes: Vec<Parsed<Scope>>,
    models: Option<BTreeSet<String>>,
    #[serde(default, deserialize_with = "weight")]
    weight: Weight,
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    budgets: Vec<BudgetTable>,
    secrets: Vec<SecretTable>,
}

/// A budget: one of `tokens` and `completion_tokens`, and the period.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, try_from = "BudgetFields")]
struct BudgetTable(Budget);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BudgetFields {
    tokens: Option<BudgetLimit>,
    completion_tokens: Option<BudgetLimit>,
    per: Option<PeriodName>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum PeriodName {
    Day,
    Month,
}

struct BudgetLimit(NonZeroU64);

impl<'de> Deserialize<'de> for BudgetLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        let limit = u64::try_from(number).ok().and_then(NonZeroU64::new);
        let problem = "must be a whole number from 1 to 9223372036854775807";
        limit
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(problem))
    }
}

impl TryFrom<BudgetFields> for BudgetTable {
    type Error = &'static str;

    fn try_from(fields: BudgetFields) -> Result<Self, &'static str> {
        let (limit, unit) = match (fields.tokens, fields.completion_tokens) {
            (Some(limit), None) => (limit.0, BudgetUnit::Tokens),
            (None, Some(limit)) => (limit.0, BudgetUnit::CompletionTokens),
            _ => return Err("a budget needs either `tokens` or `completion_tokens`"),
        };
        let period = match fields.per {
            None => BudgetPeriod::Total,
            Some(PeriodName::Day) => BudgetPeriod::Day,
            Some(PeriodName::Month) => BudgetPeriod::Month,
        };
        Ok(Self(Budget {
            limit,
            unit,
            period,
        }))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretTable {
    sha256: Parsed<SecretHash>,
    expires: Option<Expiry>,
}

fn weight<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Weight, D::Error> {
    let number = i64::deserialize(deserializer)?;
    Weight::try_from(number).map_err(serde::de::Error::custom)
}

fn default_scopes() -> Vec<Parsed<Scope>> {
    vec![Parsed(Scope::Inference)]
}

/// A value that is parsed from a string.
struct Parsed<T>(T);

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = text.parse().map_err(serde::de::Error::custom)?;
        Ok(Self(value))
    }
}

/// Time at which a secret expires: a TOML date-time with an offset.
struct Expiry(SystemTime);

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let time = Datetime::deserialize(deserializer)?;
        let time: Result<Timestamp, _> = time.to_string().parse();
        let problem = "must be a date and time with an offset, such as 2027-01-31T00:00:00Z";
        let time = time.map_err(|_| serde::de::Error::custom(problem))?;
        Ok(Self(time.into()))
    }
}

/// Reads the keys in a file.
///
/// # Errors
/// The file cannot be read, or is invalid.
pub(crate) fn read_keys(path: &Path) -> Result<ParsedKeys, KeysFileError> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| KeysFileError::new(path, error))?;
    parse_keys(path, &text)
}

/// Parses the text of a keys file. `path` names the file in errors.
pub(super) fn parse_keys(path: &Path, text: &str) -> Result<ParsedKeys, KeysFileError> {
    let table: KeysTable = toml::from_str(text).map_err(|error| KeysFileError {
        line: error.span().map(|span| line_at(text, span.start)),
        ..KeysFileError::new(path, without_value(error.message()))
    })?;
    let entries: Vec<_> = table.key.into_iter().map(KeyTable::into_entry).collect();
    let mut names = HashSet::new();
    for entry in &entries {
        let name = &entry.key.name;
        if !names.insert(name.clone()) {
            let problem = format!("two keys have the name {name}");
            return Err(KeysFileError::new(path, problem));
        }
    }
    if names.iter().any(|name| name.as_str() == VARIABLE_KEY_NAME) {
        let problem = format!("{VARIABLE_KEY_NAME} is the name of the key in TOKENWAY_API_KEY");
        return Err(KeysFileError::new(path, problem));
    }
    let mut hashes = HashSet::new();
    let stored = entries.iter().flat_map(|entry| &entry.secrets);
    for secret in stored {
        if !hashes.insert(secret.hash.to_string()) {
            let problem = "two secrets have the same sha256";
            return Err(KeysFileError::new(path, problem));
        }
    }
    Ok(ParsedKeys {
        keys: entries,
        limits: table.limits.into(),
    })
}

/// Removes the invalid value from an error of serde.
fn without_value(message: &str) -> String {
    let repeats_value =
        message.starts_with("invalid type: ") || message.starts_with("invalid value: ");
    match message.rsplit_once(", expected ") {
        Some((_, expected)) if repeats_value => format!("invalid value, expected {expected}"),
        Some(_) | None => message.to_owned(),
    }
}

fn line_at(text: &str, offset: usize) -> usize {
    let before = &text[..text.floor_char_boundary(offset)];
    before.matches('\n').count() + 1
}

impl From<LimitsTable> for KeyLimits {
    fn from(table: LimitsTable) -> Self {
        let limit = |limit: Option<Limit>| limit.map(|it| it.0);
        Self {
            requests_per_minute: limit(table.requests_per_minute),
            concurrent_requests: limit(table.concurrent_requests),
            tokens_per_minute: limit(table.tokens_per_minute),
        }
    }
}

impl KeyTable {
    fn into_entry(self) -> KeyEntry {
        let key = Key {
            name: self.name.0,
            scopes: self.scopes.into_iter().map(|scope| scope.0).collect(),
            models: self.models,
            weight: self.weight,
            quotas: Quotas {
                of_key: Quota {
                    limits: self.limits.into(),
                    ..Quota::default()
                },
                ..Quotas::default()
            },
            budgets: KeyBudgets {
                budgets: self.budgets.into_iter().map(|budget| budget.0).collect(),
                ..KeyBudgets::default()
            },
        };
        let secrets = self.secrets.into_iter().map(|secret| StoredSecret {
            hash: secret.sha256.0,
            expires: secret.expires.map(|expires| expires.0),
        });
        KeyEntry {
            key: Arc::new(key),
            secrets: secrets.collect(),
        }
    }
}

#[cfg(test)]
mod tests;
