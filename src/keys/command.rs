//! `tokenway keys`: creates, lists, revokes and rotates the keys in a keys file.

use std::fmt::Write as _;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

use super::budget::{Budget, BudgetAmount, BudgetUnit};
use super::document::{EditError, NewKey, Rotation};
use super::edit;
use super::file::read_keys;
use super::key::{Key, KeyName, Scope};
use super::limits::KeyLimits;
use super::secret::Secret;
use super::set::KeyEntry;
use super::weight::Weight;

/// Changes of a keys file. A running server applies them within a few seconds.
#[derive(Subcommand)]
pub enum KeysCommand {
    /// Create a key and print it. It cannot be shown again: the file has only its SHA-256
    New(NewOptions),
    /// List the keys, their scopes, models, limits and expiry
    List(FileOption),
    /// Remove a key. Running requests continue; further requests with the key are rejected
    Revoke(RevokeOptions),
    /// Print a new secret for a key. The old one remains valid for a while
    Rotate(RotateOptions),
}

#[derive(Args)]
pub struct FileOption {
    /// Path of the keys file. `new` creates it
    #[arg(long, env = "TOKENWAY_KEYS_FILE", value_name = "FILE")]
    keys_file: PathBuf,
}

#[derive(Args)]
pub struct NewOptions {
    /// Name of the key, which the log and the metrics show: 1 to 64 of the characters a-z, A-Z, 0-9, `.`, `_`
    /// and `-`
    name: KeyName,
    /// What the key may do: `inference` (completions, tokenizers, models), `metrics`, `admin` (which includes
    /// `metrics`), `priority` (priorities apply across keys). Separate several with commas, or repeat the flag
    #[arg(
        long,
        value_name = "SCOPE",
        value_delimiter = ',',
        default_value = "inference"
    )]
    scope: Vec<Scope>,
    /// Name of a model that the key may use; may be repeated [default: all models]
    #[arg(long, value_name = "MODEL")]
    model: Vec<String>,
    /// Share of slots and queue, relative to other keys: from 1 to 100
    #[arg(long, value_name = "N", default_value_t)]
    weight: Weight,
    /// Maximum number of requests per minute [default: no limit]
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Maximum number of requests that run or wait at the same time [default: no limit]
    #[arg(long, value_name = "N")]
    concurrent_requests: Option<NonZeroU32>,
    /// Maximum number of tokens per minute, of prompts and completions together [default: no limit]
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<NonZeroU32>,
    /// Number of tokens that the key may use, of prompts and completions together: in total (`1000000`), per day
    /// (`1000000/day`) or per month (`1000000/month`), in UTC; may be repeated [default: no budget]
    #[arg(long, value_name = "TOKENS")]
    budget: Vec<BudgetAmount>,
    /// Number of completion tokens that the key may use, in the format of `--budget` [default: no budget]
    #[arg(long, value_name = "TOKENS")]
    completion_budget: Vec<BudgetAmount>,
    /// Time until the key expires, such as `90d` or `12h` [default: it does not expire]
    #[arg(long, value_name = "TIME")]
    expires_in: Option<Span>,
    #[command(flatten)]
    file: FileOption,
}

#[derive(Args)]
pub struct RevokeOptions {
    /// Name of the key
    name: KeyName,
    #[command(flatten)]
    file: FileOption,
}

#[derive(Args)]
pub struct RotateOptions {
    /// Name of the key
    name: KeyName,
    /// Time for which the old secret remains valid, such as `1d` or `0s`
    #[arg(long, value_name = "TIME", default_value = "1d")]
    overlap: Span,
    /// Time until the new secret expires, such as `90d` [default: it does not expire]
    #[arg(long, value_name = "TIME")]
    expires_in: Option<Span>,
    #[command(flatten)]
    file: FileOption,
}

/// Output of a command.
pub struct KeysOutput {
    /// Text for standard output. For a new secret, it is the secret alone, so that a script can store it.
    pub result: String,
    /// Note for standard error.
    pub note: Option<String>,
}

/// Reason why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum KeysCommandError {
    /// The keys file could not be read or changed.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// A time is before now, or too far in the future.
    #[error("{flag} must be a time from 0 to about 7,000 years, such as 90d or 12h")]
    Time {
        /// Name of the flag.
        flag: &'static str,
    },
}

impl KeysCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// The file cannot be read or changed, or a time is out of range. The file is then as it was.
    pub fn run(&self) -> Result<KeysOutput, KeysCommandError> {
        let now = Timestamp::now();
        match self {
            Self::New(options) => options.run(now),
            Self::List(FileOption { keys_file }) => {
                let keys = read_keys(keys_file).map_err(EditError::from)?.keys;
                Ok(KeysOutput {
                    result: render_list(&keys, now.into()),
                    note: None,
                })
            }
            Self::Revoke(RevokeOptions { name, file }) => {
                edit::revoke_key(&file.keys_file, name)?;
                Ok(KeysOutput {
                    result: String::new(),
                    note: Some(format!("The key {name} is revoked.")),
                })
            }
            Self::Rotate(options) => options.run(now),
        }
    }
}

impl NewOptions {
    fn run(&self, now: Timestamp) -> Result<KeysOutput, KeysCommandError> {
        let new = NewKey {
            name: self.name.clone(),
            scopes: self.scope.iter().copied().collect(),
            models: self.model.iter().cloned().collect(),
            weight: self.weight,
            limits: KeyLimits {
                requests_per_minute: self.requests_per_minute,
                concurrent_requests: self.concurrent_requests,
                tokens_per_minute: self.tokens_per_minute,
            },
            budgets: self.budgets(),
            expires: expiry("--expires-in", self.expires_in, now)?,
        };
        let secret = edit::add_key(&self.file.keys_file, &new)?;
        Ok(show_secret(&secret, &self.name, &self.file.keys_file))
    }
}

impl NewOptions {
    fn budgets(&self) -> Vec<Budget> {
        let all = self.budget.iter();
        let of_completions = self.completion_budget.iter();
        let budgets = all.map(|amount| amount.of(BudgetUnit::Tokens));
        let of_completions = of_completions.map(|amount| amount.of(BudgetUnit::CompletionTokens));
        budgets.chain(of_completions).collect()
    }
}

impl RotateOptions {
    fn run(&self, now: Timestamp) -> Result<KeysOutput, KeysCommandError> {
        let rotation = Rotation {
            old_expire: time_after("--overlap", self.overlap, now)?,
            new_expires: expiry("--expires-in", self.expires_in, now)?,
            now,
        };
        let secret = edit::rotate_key(&self.file.keys_file, &self.name, &rotation)?;
        Ok(show_secret(&secret, &self.name, &self.file.keys_file))
    }
}

fn show_secret(secret: &Secret, name: &KeyName, file: &Path) -> KeysOutput {
    let file = file.display();
    KeysOutput {
        result: format!("{}\n", secret.as_str()),
        note: Some(format!(
            "This is the key {name}. Store it now: it cannot be shown again. {file} has its SHA-256."
        )),
    }
}

fn expiry(
    flag: &'static str,
    span: Option<Span>,
    now: Timestamp,
) -> Result<Option<Timestamp>, KeysCommandError> {
    span.map(|span| time_after(flag, span, now)).transpose()
}

fn time_after(
    flag: &'static str,
    span: Span,
    now: Timestamp,
) -> Result<Timestamp, KeysCommandError> {
    let out_of_range = || KeysCommandError::Time { flag };
    // A day is 24 hours in UTC.
    let time = now.to_zoned(TimeZone::UTC).checked_add(span);
    let time = time.map_err(|_| out_of_range())?.timestamp();
    (time >= now).then_some(time).ok_or_else(out_of_range)
}

/// Renders a table with one line for each key.
fn render_list(keys: &[KeyEntry], now: SystemTime) -> String {
    let header = ["NAME", "SCOPES", "MODELS", "LIMITS", "EXPIRES"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(header)
        .chain(keys.iter().map(|entry| row(entry, now)))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..4).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, &width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        text.push_str(&row[4]);
        text.push('\n');
    }
    text
}

fn row(entry: &KeyEntry, now: SystemTime) -> [String; 5] {
    let scopes: Vec<_> = entry.key.scopes.iter().map(|scope| scope.name()).collect();
    let models = entry.key.models.as_ref();
    let models = models.map_or_else(
        || "all".to_owned(),
        |models| models.iter().cloned().collect::<Vec<_>>().join(","),
    );
    let expiries: Vec<_> = entry
        .secrets
        .iter()
        .map(|secret| match secret.expires {
            None => "never".to_owned(),
            Some(expires) if expires <= now => "expired".to_owned(),
            Some(expires) => {
                Timestamp::try_from(expires).map_or_else(|_| "?".to_owned(), |it| it.to_string())
            }
        })
        .collect();
    let expiries = match expiries.is_empty() {
        true => "no secret".to_owned(),
        false => expiries.join(", "),
    };
    [
        entry.key.name.to_string(),
        scopes.join(","),
        models,
        limits_text(&entry.key),
        expiries,
    ]
}

/// Returns the limits and budgets of a key as text, such as `60 requests/min, 4 concurrent`, with the weight if it is
/// not the default.
fn limits_text(key: &Key) -> String {
    let limits = &key.quotas.of_key.limits;
    let weight = Some(key.weight).filter(|weight| *weight != Weight::default());
    let weight = weight.map(|weight| format!("weight {}", weight.get()));
    let limits = [
        (limits.requests_per_minute, "requests/min"),
        (limits.concurrent_requests, "concurrent"),
        (limits.tokens_per_minute, "tokens/min"),
    ]
    .into_iter()
    .filter_map(|(limit, unit)| limit.map(|limit| format!("{limit} {unit}")));
    let budgets = key.budgets.budgets.iter().map(Budget::to_string);
    let texts: Vec<_> = weight.into_iter().chain(limits).chain(budgets).collect();
    match texts.is_empty() {
        true => "none".to_owned(),
        false => texts.join(", "),
    }
}
