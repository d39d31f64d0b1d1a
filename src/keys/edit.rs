//! Changes to the keys file. A change keeps comments and all other keys, and replaces the file in one step.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tempfile::NamedTempFile;
use toml_edit::{Array, ArrayOfTables, Datetime, DocumentMut, InlineTable, Item, Table, Value};

use super::budget::{Budget, BudgetPeriod, BudgetUnit};
use super::file::{KeysFileError, parse_keys};
use super::key::{KeyName, Scope};
use super::limits::KeyLimits;
use super::secret::{NoRandomNumbers, Secret, SecretHash};

/// Key of the list of tables in the keys file.
const TABLES: &str = "key";

/// A change of the keys file that failed. The file is as it was.
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
    pub(super) limits: KeyLimits,
    pub(super) budgets: Vec<Budget>,
    pub(super) expires: Option<Timestamp>,
}

/// Adds a key with a new secret, which is returned.
pub(super) fn add_key(path: &Path, new: &NewKey) -> Result<Secret, EditError> {
    let secret = Secret::generate()?;
    edit(path, |document| {
        if find(document, &new.name).is_some() {
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
        let limits = limits_table(&new.limits);
        if !limits.is_empty() {
            table["limits"] = toml_edit::value(limits);
        }
        if !new.budgets.is_empty() {
            let budgets = new.budgets.iter().map(|budget| budget_table(*budget));
            table["budgets"] = toml_edit::value(budgets.collect::<Array>());
        }
        let mut secrets = Array::new();
        push_secret(&mut secrets, &secret.hash(), new.expires);
        table["secrets"] = toml_edit::value(secrets);
        let tables = document
            .entry(TABLES)
            .or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
        convert_to_tables(tables).push(table);
        Ok(())
    })?;
    Ok(secret)
}

/// Removes a key with all its secrets.
pub(super) fn revoke_key(path: &Path, name: &KeyName) -> Result<(), EditError> {
    edit(path, |document| {
        let at = find(document, name).ok_or_else(|| EditError::NotFound(name.clone()))?;
        let tables = convert_to_tables(&mut document[TABLES]);
        let comment = comment_before(tables, at);
        tables.remove(at);
        // The comment may be about the whole file, so it stays.
        if let Some(next) = tables.get_mut(at) {
            let own = comment_of(next);
            next.decor_mut().set_prefix(comment + &own);
        } else {
            let trailing = document.trailing().as_str().unwrap_or_default();
            let trailing = comment + trailing;
            document.set_trailing(trailing);
        }
        Ok(())
    })
}

/// Expiry of the secrets of a key that is rotated.
pub(super) struct Rotation {
    /// Time at which the present secrets expire, unless they expire earlier.
    pub(super) old_expire: Timestamp,
    /// Time at which the new secret expires.
    pub(super) new_expires: Option<Timestamp>,
    /// The present time. Secrets that have expired before are removed.
    pub(super) now: Timestamp,
}

/// Adds a new secret to a key, and returns the secret. The present secrets expire as `rotation` says.
pub(super) fn rotate_key(
    path: &Path,
    name: &KeyName,
    rotation: &Rotation,
) -> Result<Secret, EditError> {
    let secret = Secret::generate()?;
    edit(path, |document| {
        let at = find(document, name).ok_or_else(|| EditError::NotFound(name.clone()))?;
        let tables = convert_to_tables(&mut document[TABLES]);
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
        push_secret(secrets, &secret.hash(), rotation.new_expires);
        Ok(())
    })?;
    Ok(secret)
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

/// Returns the position of the key with this name.
fn find(document: &mut DocumentMut, name: &KeyName) -> Option<usize> {
    let tables = convert_to_tables(document.get_mut(TABLES)?);
    let is_named = |table: &Table| table["name"].as_str() == Some(name.as_str());
    tables.iter().position(is_named)
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

/// Changes the file at `path`, which may not exist yet.
fn edit(
    path: &Path,
    change: impl FnOnce(&mut DocumentMut) -> Result<(), EditError>,
) -> Result<(), EditError> {
    let failed = |error: io::Error| KeysFileError::new(path, error);
    // If the path is a link, the file that it names is replaced, not the link.
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(failed(error).into()),
    };
    let folder = folder_of(&target);
    // The lock on the folder keeps two commands from changing the file at the same time.
    let lock = File::open(&folder).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let text = match fs::read_to_string(&target) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error).into()),
    };
    parse_keys(path, &text)?;
    let document = text.parse::<DocumentMut>();
    let mut document = document.map_err(|error| KeysFileError::new(path, error.message()))?;
    change(&mut document)?;
    let text = document.to_string();
    parse_keys(path, &text)?;
    replace(&target, &folder, &text).map_err(failed)?;
    Ok(())
}

fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    folder.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// Replaces the file's text in one step. A new file can be read by its owner only. Otherwise the owner and the
/// permissions stay, so that a server of another user can still read the file.
fn replace(target: &Path, folder: &Path, text: &str) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    match fs::metadata(target) {
        Ok(old) => {
            let new = file.as_file().metadata()?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                fchown(file.as_file(), Some(old.uid()), Some(old.gid()))?;
            }
            file.as_file().set_permissions(old.permissions())?;
        }
        Err(_) => file
            .as_file()
            .set_permissions(Permissions::from_mode(0o600))?,
    }
    file.as_file().sync_all()?;
    file.persist(target)?;
    File::open(folder)?.sync_all()
}
