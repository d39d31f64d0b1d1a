//! Token budgets of a key: how many tokens it may use per day, per month or in total. This module must not know
//! requests or files.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::Arc;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

mod reservation;
#[cfg(test)]
mod tests;
mod usage;

pub(crate) use reservation::Reservation;
pub(crate) use usage::{BudgetUsage, TokenCount, UsageRecord};

use crate::error::{Error, ErrorKind};

/// A budget of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Number of tokens.
    pub limit: NonZeroU64,
    /// Tokens that count.
    pub unit: BudgetUnit,
    /// Period after which the budget starts again.
    pub period: BudgetPeriod,
}

/// Tokens that count toward a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetUnit {
    /// Tokens of prompts and completions.
    Tokens,
    /// Tokens of completions.
    CompletionTokens,
}

/// Time after which a budget starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetPeriod {
    /// A day, in UTC.
    Day,
    /// A month, in UTC.
    Month,
    /// The budget never starts again.
    Total,
}

impl Budget {
    /// Returns how many of these tokens count toward the budget.
    fn count(self, tokens: TokenCount) -> u64 {
        match self.unit {
            BudgetUnit::Tokens => tokens.sum(),
            BudgetUnit::CompletionTokens => tokens.completion,
        }
    }

    /// Returns the time at which the budget starts again.
    fn starts_again(self, today: Date) -> Option<Timestamp> {
        let date = match self.period {
            BudgetPeriod::Day => today.checked_add(1.day()),
            BudgetPeriod::Month => today.first_of_month().checked_add(1.month()),
            BudgetPeriod::Total => return None,
        };
        let midnight = date.ok()?.to_zoned(TimeZone::UTC).ok()?;
        Some(midnight.timestamp())
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            BudgetUnit::Tokens => "tokens",
            BudgetUnit::CompletionTokens => "completion tokens",
        };
        let period = match self.period {
            BudgetPeriod::Day => "per day",
            BudgetPeriod::Month => "per month",
            BudgetPeriod::Total => "in total",
        };
        write!(f, "{} {unit} {period}", self.limit)
    }
}

/// Limit and period of a budget on the command line: `1000`, `1000/day` or `1000/month`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BudgetAmount {
    limit: NonZeroU64,
    period: BudgetPeriod,
}

/// Error for a text that is not a budget.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a number of tokens from 1 to 9223372036854775807, alone or followed by `/day` or `/month`"
)]
pub(super) struct InvalidBudget;

impl BudgetAmount {
    /// Returns the budget with this unit.
    pub(super) fn of(self, unit: BudgetUnit) -> Budget {
        Budget {
            limit: self.limit,
            unit,
            period: self.period,
        }
    }
}

impl FromStr for BudgetAmount {
    type Err = InvalidBudget;

    fn from_str(text: &str) -> Result<Self, InvalidBudget> {
        let (limit, period) = match text.split_once('/') {
            None => (text, BudgetPeriod::Total),
            Some((limit, "day")) => (limit, BudgetPeriod::Day),
            Some((limit, "month")) => (limit, BudgetPeriod::Month),
            Some(_) => return Err(InvalidBudget),
        };
        let limit: i64 = limit.parse().map_err(|_| InvalidBudget)?;
        let limit = u64::try_from(limit).ok().and_then(NonZeroU64::new);
        let limit = limit.ok_or(InvalidBudget)?;
        Ok(Self { limit, period })
    }
}

/// The budgets of a key, and their usage.
#[derive(Clone, Debug)]
pub(crate) struct KeyBudgets {
    pub(crate) budgets: Arc<[Budget]>,
    pub(crate) usage: Arc<BudgetUsage>,
}

impl Default for KeyBudgets {
    fn default() -> Self {
        Self {
            budgets: Arc::new([]),
            usage: Arc::default(),
        }
    }
}

/// Tokens that a prompt and its completion need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenNeed {
    /// Number of tokens of the prompt; 0 if it is not known yet.
    pub(crate) prompt: u64,
    /// Maximum number of tokens of the completion, of all choices together.
    pub(crate) completion: u64,
    /// True if the completion may need more.
    pub(crate) is_open_ended: bool,
}

impl KeyBudgets {
    /// Reserves tokens for a prompt and its completion. If the budgets do not allow the whole completion, reserves as
    /// much as they allow. Returns `None` if the key has no budgets.
    ///
    /// # Errors
    /// A budget does not allow the prompt and one token of its completion.
    pub(crate) fn reserve(&self, need: TokenNeed) -> Result<Option<Reservation>, Error> {
        if self.budgets.is_empty() {
            return Ok(None);
        }
        Reservation::new(self.clone(), need, today()).map(Some)
    }
}

#[cfg(test)]
impl KeyBudgets {
    /// Creates a budget of this number of tokens in total.
    pub(crate) fn for_test(limit: u64) -> Self {
        let limit = NonZeroU64::new(limit).expect("a positive limit");
        let budget = Budget {
            limit,
            unit: BudgetUnit::Tokens,
            period: BudgetPeriod::Total,
        };
        Self {
            budgets: Arc::new([budget]),
            usage: Arc::default(),
        }
    }

    pub(crate) fn used(&self) -> TokenCount {
        self.usage.counts()[0]
    }

    pub(crate) fn reserved(&self) -> TokenCount {
        self.usage.counts()[1]
    }
}

/// Returns the present date in UTC.
pub(super) fn today() -> Date {
    Timestamp::now().to_zoned(TimeZone::UTC).date()
}

/// A budget that does not allow a request's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shortage {
    budget: Budget,
    /// Number of tokens that the key has not used.
    unused: u64,
    /// Number of tokens that are neither used nor reserved.
    available: u64,
}

impl Shortage {
    /// Returns the error of a request that needs `needed` tokens of the budget to start.
    fn rejection(self, needed: u64, today: Date) -> Error {
        let Self {
            budget,
            unused,
            available,
        } = self;
        if unused == 0 {
            return self.used_up(today);
        }
        if unused >= needed {
            let message = format!(
                "The API key's budget of {budget} has {unused} tokens left, but running requests have reserved all \
                 but {available} of them. Retry when these requests have ended."
            );
            return Error::new(ErrorKind::RateLimited, message);
        }
        let message = format!(
            "The request needs at least {needed} tokens to start, but only {unused} are left of the API key's budget \
             of {budget}."
        );
        Error::new(ErrorKind::BudgetExhausted, message)
    }

    /// Returns the error of a request that ends because it can get no more tokens of the budget.
    fn used_up(self, today: Date) -> Error {
        let budget = self.budget;
        if self.unused > 0 {
            let message = format!(
                "The rest of the API key's budget of {budget} is reserved for other requests."
            );
            return Error::new(ErrorKind::BudgetExhausted, message);
        }
        let again = budget.starts_again(today);
        let again = again.map_or_else(String::new, |at| format!(" It starts again at {at}."));
        let message = format!("The API key's budget of {budget} is used up.{again}");
        Error::new(ErrorKind::BudgetExhausted, message)
    }
}
