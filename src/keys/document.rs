//! Edits the text of a keys file: adds keys, removes keys, and gives keys new secrets. An edit keeps comments and all
//! other keys. This module must not know where the text is stored.

use std::collections::BTreeSet;
use std::path::Path;

use jiff::Timestamp;
use toml_edit::{Array, ArrayOfTables, Datetime, DocumentMut, InlineTable, Item, Table, Value};

use super::budget::{Budget, BudgetPeriod, BudgetUnit};
use super::file::{KeysFileError, parse_keys};
use super::key::{KeyName, Scope};
use super::limits::KeyLimits;
use super::secret::{NoRandomNumbers, SecretHash};
use super::weight::Weight;

/// Key of the list of tables in the keys file.
const TABLES: &str = "key";

/// A failed change of the keys file. The file is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// The file is invalid, or cannot be read or written.
    #[error(transparent)]
    File(#[from] KeysFileError),
    /// The file already has a key with this name.
    #[error(
        "a key with the name {0} already exists; choose another name, or use `tokenway keys rotate {0}`"
    )]
    Exists(KeyName),
    /// The file has no key with this name.
    #[error("there is no key with the name {0}; `tokenway keys list` shows the names")]
    NotFound(KeyName),
    /// No secret can be generated.
    #[error(transparent)]
    Random(#[from] NoRandomNumbers),
}

/// A key to be added.
pub(super) struct NewKey {
    pub(super) name: KeyName,
    pub(super) scopes: BTreeSet<Scope>,
    /// Empty for all models.
    pub(super) models: BTreeSet<String>,
    pub(super) weight: Weight,
    pub(super) limits: KeyLimits,
    pub(super) budgets: Vec<Budget>,
    pub(super) expires: Option<Timestamp>,
}

/// Expiry of the secrets of a key that is rotated.
pub(super) struct Rotation {
    /// Time at which the present secrets expire, unless they expire earlier.
    pub(super) old_expire: Timestamp,
    /// Time at which the new secret expires.
    pub(super) new_expires: Option<Timestamp>,
    /// The current time. Secrets that have expired are removed.
    pub(super) now: Timestamp,
}

/// The text of a keys file.
pub(super) struct KeysDocument(DocumentMut);

impl KeysDocument {
    /// Parses the text of the file at `path`.
    ///
    /// # Errors
    /// The text is not a valid keys file.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, KeysFileError> {
        parse_keys(path, text)?;
        let document = text.parse::<DocumentMut>();
        let document = document.map_err(|error| KeysFileError::new(path, error.message()))?;
        Ok(Self(document))
    }

    /// Returns the text with all changes.
    ///
    /// # Errors
    /// The text would not be a valid keys file.
    pub(super) fn into_text(self, path: &Path) -> Result<String, KeysFileError> {
        let text = self.0.to_string();
        parse_keys(path, &text)?;
        Ok(text)
    }

    /// Adds a key whose secret has this hash.
    ///
    /// # Errors
    /// There is a key with this name.
    pub(super) fn add(&mut self, new: &NewKey, hash: &SecretHash) -> Result<(), EditError> {
        if self.find(&new.name).is_some() {
            return Err(EditError::Exists(new.name.clone()));
        }
        let mut table = Table::new();
        table["name"] = toml_edit::value(new.name.as_str());
        let scopes = new.scopes.iter().map(|scope| scope.name());
        table["scopes"] = toml_edit::value(scopes.collect::<Array>());
        if !new.models.is_empty() {
            let models = new.models.iter().map(String::as_str);
            table["models"] = toml_edit::value(models.collect::<Array>());
        }
        if new.weight != Weight::default() {
            table["weight"] = toml_edit::value(i64::from(new.weight.get()));
        }
        let limits = limits_table(&new.limits);
        if !limits.is_empty() {
            table["limits"] = toml_edit::value(limits);
        }
        if !new.budgets.is_empty() {
            let budgets = new.budgets.iter().map(|budget| budget_table(*budget));
            table["budgets"] = toml_edit::value(budgets.collect::<Array>());
        }
        let mut secrets = Array::new();
        push_secret(&mut secrets, hash, new.expires);
        table["secrets"] = toml_edit::value(secrets);
        let tables = self.0.entry(TABLES);
        let tables = tables.or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
        convert_to_tables(tables).push(table);
        Ok(())
    }

    /// Removes a key with all its secrets.
    ///
    /// # Errors
    /// There is no key with this name.
    pub(super) fn remove(&mut self, name: &KeyName) -> Result<(), EditError> {
        let at = self.position(name)?;
        let document = &mut self.0;
        let tables = convert_to_tables(&mut document[TABLES]);
        let mut comment = comment_before(tables, at);
        tables.remove(at);
        // The comment may be about the whole file, so it stays. Blank lines alone do not.
        if comment.trim().is_empty() {
            comment.clear();
        }
        if let Some(next) = tables.get_mut(at) {
            let own = comment_of(next);
            next.decor_mut().set_prefix(comment + &own);
        } else {
            let trailing = document.trailing().as_str().unwrap_or_default();
            let trailing = comment + trailing;
            document.set_trailing(trailing);
        }
        Ok(())
    }

    /// Adds a secret with this hash to a key. The present secrets expire as `rotation` says.
    ///
    /// # Errors
    /// There is no key with this name.
    pub(super) fn rotate(
        &mut self,
        name: &KeyName,
        rotation: &Rotation,
        hash: &SecretHash,
    ) -> Result<(), EditError> {
        let at = self.position(name)?;
        let tables = convert_to_tables(&mut self.0[TABLES]);
        let table = tables.get_mut(at).expect("`find` returned its position");
        let secrets = &mut table["secrets"];
        secrets.make_value();
        let secrets = secrets.as_array_mut().expect("the file was checked");
        secrets.retain(|secret| expiry(secret).is_none_or(|expires| expires > rotation.now));
        for secret in secrets.iter_mut() {
            let expires =
                expiry(secret).map_or(rotation.old_expire, |at| at.min(rotation.old_expire));
            let secret = secret.as_inline_table_mut().expect("the file was checked");
            secret.insert("expires", to_toml(expires).into());
            secret.fmt();
        }
        push_secret(secrets, hash, rotation.new_expires);
        Ok(())
    }

    fn position(&mut self, name: &KeyName) -> Result<usize, EditError> {
        self.find(name)
            .ok_or_else(|| EditError::NotFound(name.clone()))
    }

    /// Returns the position of the key with this name.
    fn find(&mut self, name: &KeyName) -> Option<usize> {
        let tables = convert_to_tables(self.0.get_mut(TABLES)?);
        let is_named = |table: &Table| table["name"].as_str() == Some(name.as_str());
        tables.iter().position(is_named)
    }
}

fn limits_table(limits: &KeyLimits) -> InlineTable {
    let mut table = InlineTable::new();
    for (name, limit) in [
        ("requests_per_minute", limits.requests_per_minute),
        ("concurrent_requests", limits.concurrent_requests),
        ("tokens_per_minute", limits.tokens_per_minute),
    ] {
        if let Some(limit) = limit {
            table.insert(name, i64::from(limit.get()).into());
        }
    }
    table
}

fn budget_table(budget: Budget) -> InlineTable {
    let unit = match budget.unit {
        BudgetUnit::Tokens => "tokens",
        BudgetUnit::CompletionTokens => "completion_tokens",
    };
    let period = match budget.period {
        BudgetPeriod::Day => Some("day"),
        BudgetPeriod::Month => Some("month"),
        BudgetPeriod::Total => None,
    };
    let mut table = InlineTable::new();
    let limit = i64::try_from(budget.limit.get()).unwrap_or(i64::MAX);
    table.insert(unit, limit.into());
    if let Some(period) = period {
        table.insert("per", period.into());
    }
    table
}

/// Adds a secret on a line of its own.
fn push_secret(secrets: &mut Array, hash: &SecretHash, expires: Option<Timestamp>) {
    let mut secret = InlineTable::new();
    secret.insert("sha256", hash.to_string().into());
    if let Some(expires) = expires {
        secret.insert("expires", to_toml(expires).into());
    }
    // A comment after the last secret stays in front of the new one.
    let after_last = secrets.trailing().as_str().unwrap_or_default();
    let prefix = format!("{}\n    ", after_last.trim_end());
    let mut secret = Value::from(secret);
    secret.decor_mut().set_prefix(prefix);
    secrets.push_formatted(secret);
    secrets.set_trailing_comma(true);
    secrets.set_trailing("\n");
}

/// Returns the comment before the key at this position.
fn comment_before(tables: &ArrayOfTables, at: usize) -> String {
    tables.get(at).map(comment_of).unwrap_or_default()
}

fn comment_of(table: &Table) -> String {
    let prefix = table.decor().prefix().and_then(|prefix| prefix.as_str());
    prefix.unwrap_or_default().to_owned()
}

fn expiry(secret: &Value) -> Option<Timestamp> {
    let expires = secret.as_inline_table()?.get("expires")?.as_datetime()?;
    expires.to_string().parse().ok()
}

fn to_toml(time: Timestamp) -> Datetime {
    let seconds = Timestamp::from_second(time.as_second()).unwrap_or(time);
    let parsed = seconds.to_string().parse();
    parsed.expect("jiff writes times in the format of RFC 3339")
}

/// Returns the tables of the keys. Inline tables become `[[key]]` tables.
fn convert_to_tables(tables: &mut Item) -> &mut ArrayOfTables {
    if !tables.is_array_of_tables() {
        let found = std::mem::take(tables).into_array_of_tables();
        *tables = Item::ArrayOfTables(found.unwrap_or_default());
    }
    tables
        .as_array_of_tables_mut()
        .expect("it was just converted")
}

#[cfg(test)]
mod tests;
