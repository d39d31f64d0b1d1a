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
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<KeyEntry>, String> {
        let parsed = parse_keys(Path::new("keys.toml"), text);
        parsed.map(|it| it.keys).map_err(|error| error.to_string())
    }

    fn hash(secret: &str) -> SecretHash {
        SecretHash::of(secret.as_bytes())
    }

    #[test]
    fn a_key_has_scopes_models_and_secrets() {
        let (one, two) = (hash("one"), hash("two"));
        let text = format!(
            "[[key]]\nname = \"a\"\nscopes = [\"admin\", \"inference\"]\nmodels = [\"m\"]\nsecrets = [\n\
             {{ sha256 = \"{one}\" }},\n{{ sha256 = \"{two}\", expires = 2027-01-31T00:00:00+01:00 }},\n]\n\
             [[key]]\nname = \"b\"\nsecrets = []\n"
        );
        let keys = parse(&text).unwrap();
        let (a, b) = (&keys[0], &keys[1]);
        assert_eq!(a.key.name.as_str(), "a");
        assert_eq!(a.key.scopes, [Scope::Inference, Scope::Admin].into());
        assert_eq!(a.key.models, Some(["m".to_owned()].into()));
        assert!(a.secrets[0].hash.matches(&one) && a.secrets[0].expires.is_none());
        let expires: Timestamp = "2027-01-30T23:00:00Z".parse().unwrap();
        assert_eq!(a.secrets[1].expires, Some(expires.into()));
        assert_eq!(b.key.scopes, [Scope::Inference].into());
        assert_eq!((&b.key.models, b.secrets.len()), (&None, 0));
        assert_eq!(parse("").unwrap().len(), 0);
    }

    #[test]
    fn a_key_has_weight_1_unless_the_file_says_otherwise() {
        let key = |rest: &str| parse(&format!("[[key]]\nname = \"a\"\nsecrets = []\n{rest}"));
        let weight = |rest: &str| key(rest).unwrap()[0].key.weight.get();
        assert_eq!([weight(""), weight("weight = 100")], [1, 100]);
        for invalid in ["0", "101", "-1", "99999999999"] {
            let error = key(&format!("weight = {invalid}")).err().unwrap();
            let expected = "keys.toml:4: must be a whole number from 1 to 100";
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn limits_belong_to_one_key_or_to_all_keys() {
        let text = "[limits]\nconcurrent_requests = 4\n[[key]]\nname = \"a\"\nsecrets = []\n\
                    limits = { requests_per_minute = 60, tokens_per_minute = 1000 }\n";
        let parsed = parse_keys(Path::new("keys.toml"), text).ok().unwrap();
        let expected = KeyLimits {
            concurrent_requests: NonZeroU32::new(4),
            ..KeyLimits::default()
        };
        assert_eq!(parsed.limits, expected);
        let expected = KeyLimits {
            requests_per_minute: NonZeroU32::new(60),
            concurrent_requests: None,
            tokens_per_minute: NonZeroU32::new(1_000),
        };
        assert_eq!(parsed.keys[0].key.quotas.of_key.limits, expected);
        let zero = parse("[limits]\nrequests_per_minute = 0\n").err().unwrap();
        assert!(
            zero.contains("keys.toml:2: must be a whole number from 1"),
            "{zero}"
        );
    }

    #[test]
    fn a_budget_counts_tokens_per_day_per_month_or_in_total() {
        let text = |budget: &str| {
            format!("[[key]]\nname = \"a\"\nsecrets = []\nbudgets = [{{ {budget} }}]\n")
        };
        for (budget, expected) in [
            ("tokens = 5, per = \"day\"", "5 tokens per day"),
            ("tokens = 6, per = \"month\"", "6 tokens per month"),
            ("completion_tokens = 7", "7 completion tokens in total"),
        ] {
            let keys = parse(&text(budget)).unwrap();
            let budgets = &keys[0].key.budgets.budgets;
            assert_eq!(budgets.len(), 1);
            assert_eq!(budgets[0].to_string(), expected);
        }
        for (budget, expected) in [
            ("per = \"day\"", "needs either `tokens` or"),
            (
                "tokens = 1, completion_tokens = 1",
                "needs either `tokens` or",
            ),
            ("tokens = 0", "must be a whole number from 1"),
            ("tokens = 1, per = \"year\"", "expected `day` or `month`"),
            ("tokens = 1, for = \"day\"", "unknown field `for`"),
        ] {
            let error = parse(&text(budget)).err().expect("the file is invalid");
            assert!(error.starts_with("keys file keys.toml:4: "), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_error_names_the_line_and_repeats_no_value() {
        let key = |rest: &str| format!("[[key]]\nname = \"a\"\nsecrets = []\n{rest}\n");
        for (text, expected) in [
            (key("scope = []"), "keys.toml:4: unknown field `scope`"),
            (
                key("scopes = [\"tw_secret\"]"),
                "keys.toml:4: must be inference, metrics, admin or priority",
            ),
            (key("[[keys]]"), "keys.toml:4: unknown field `keys`"),
            (
                "[[key]]\nname = \"tw secret\"\nsecrets = []".to_owned(),
                "keys.toml:2: must be 1 to 64 of the characters",
            ),
            (
                "[[key]]\nname = \"a\"\nsecrets = [{ sha256 = \"tw_secret\" }]".to_owned(),
                "keys.toml:3: must be the SHA-256 of the key in 64 hexadecimal digits",
            ),
            (
                format!(
                    "[[key]]\nname = \"a\"\nsecrets = [{{ sha256 = \"{}\", expires = 2027-01-31 }}]",
                    hash("a")
                ),
                "keys.toml:3: must be a date and time with an offset",
            ),
            (
                "[[key]]\nname = \"a\"".to_owned(),
                "missing field `secrets`",
            ),
            (
                format!("{0}{0}", key("")),
                "keys.toml: two keys have the name a",
            ),
            (
                format!(
                    "[[key]]\nname = \"a\"\nsecrets = [{{ sha256 = \"{0}\" }}, {{ sha256 = \"{0}\" }}]",
                    hash("a")
                ),
                "keys.toml: two secrets have the same sha256",
            ),
            ("key = tw_secret".to_owned(), "keys.toml:1: "),
            (
                "[[key]]\nname = \"a\"\nsecrets = \"tw_secret\"".to_owned(),
                "keys.toml:3: invalid value, expected a sequence",
            ),
            (
                "[[key]]\nname = \"a\"\nsecrets = [\"tw_secret\"]".to_owned(),
                "keys.toml:3: invalid value, expected",
            ),
        ] {
            let error = parse(&text).err().expect("the file is invalid");
            assert!(error.contains(expected), "{error}");
            assert!(
                !error.contains("secret\"") && !error.contains("tw_"),
                "{error}"
            );
        }
    }
}
