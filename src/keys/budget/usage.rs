//! The tokens that a key has used and reserved. This module must not know requests or files.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use super::{Budget, BudgetPeriod, Shortage};

/// Numbers of tokens of prompts and of completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenCount {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
}

impl TokenCount {
    /// Returns the number of all tokens.
    pub(crate) fn sum(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }

    fn saturating_sub(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.saturating_sub(other.prompt),
            completion: self.completion.saturating_sub(other.completion),
        }
    }
}

/// Tokens that a key has used, and those that are reserved for its running requests.
///
/// Charging a batch of tokens takes four atomic operations and no lock. The lock protects the state that depends on the
/// date; it is taken when a reservation is made or grows, and when the usage is stored.
#[derive(Debug, Default)]
pub(crate) struct BudgetUsage {
    /// All tokens that the key has ever used.
    used: AtomicTokens,
    reserved: AtomicTokens,
    periods: Mutex<Periods>,
}

#[derive(Debug, Default)]
struct AtomicTokens {
    prompt: AtomicU64,
    completion: AtomicU64,
}

/// The current day and month, and the tokens that had been used before each of them.
#[derive(Clone, Copy, Debug, Default)]
struct Periods {
    /// `None` before the first request.
    date: Option<Date>,
    used_before_day: TokenCount,
    used_before_month: TokenCount,
}

/// Usage of a key, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UsageRecord {
    /// Date of `day` and `month`, in UTC.
    pub(crate) date: Date,
    pub(crate) day: TokenCount,
    pub(crate) month: TokenCount,
    pub(crate) total: TokenCount,
}

impl AtomicTokens {
    fn new(tokens: TokenCount) -> Self {
        Self {
            prompt: AtomicU64::new(tokens.prompt),
            completion: AtomicU64::new(tokens.completion),
        }
    }

    fn get(&self) -> TokenCount {
        TokenCount {
            prompt: self.prompt.load(Ordering::Acquire),
            completion: self.completion.load(Ordering::Acquire),
        }
    }

    fn add(&self, tokens: TokenCount) {
        self.prompt.fetch_add(tokens.prompt, Ordering::Relaxed);
        self.completion
            .fetch_add(tokens.completion, Ordering::Relaxed);
    }

    fn subtract(&self, tokens: TokenCount) {
        self.prompt.fetch_sub(tokens.prompt, Ordering::Release);
        self.completion
            .fetch_sub(tokens.completion, Ordering::Release);
    }
}

impl BudgetUsage {
    /// Restores the usage that was stored.
    pub(crate) fn restore(record: &UsageRecord) -> Self {
        Self {
            used: AtomicTokens::new(record.total),
            reserved: AtomicTokens::default(),
            periods: Mutex::new(Periods {
                date: Some(record.date),
                used_before_day: record.total.saturating_sub(record.day),
                used_before_month: record.total.saturating_sub(record.month),
            }),
        }
    }

    /// Returns the record to store. `None` if the key has used nothing yet.
    pub(crate) fn record(&self, today: Date) -> Option<UsageRecord> {
        let periods = self.periods(today);
        let total = self.used.get();
        let date = periods.date.filter(|_| total.sum() > 0)?;
        Some(UsageRecord {
            date,
            day: total.saturating_sub(periods.used_before_day),
            month: total.saturating_sub(periods.used_before_month),
            total,
        })
    }

    /// Reserves a prompt, and as many tokens of its completion as the budgets allow. Returns the reserved number of
    /// completion tokens. `need` must have `minimum` completion tokens at least.
    ///
    /// # Errors
    /// A budget does not allow the prompt and `minimum` tokens of the completion. Nothing is reserved then.
    pub(super) fn reserve(
        &self,
        budgets: &[Budget],
        need: TokenCount,
        minimum: u64,
        today: Date,
    ) -> Result<u64, Shortage> {
        let periods = self.periods(today);
        let mut completion = need.completion;
        for budget in budgets {
            let state = self.state(*budget, &periods);
            let prompt = budget.count(TokenCount {
                completion: 0,
                ..need
            });
            match state.available.checked_sub(prompt) {
                Some(rest) if rest >= minimum => completion = completion.min(rest),
                Some(_) | None => return Err(state),
            }
        }
        self.reserved.add(TokenCount { completion, ..need });
        Ok(completion)
    }

    /// Returns the largest number of tokens by which the used and reserved tokens together exceed a budget; 0 if they
    /// exceed none.
    pub(super) fn excess(&self, budgets: &[Budget], today: Date) -> u64 {
        let periods = self.periods(today);
        let excess = budgets.iter().map(|budget| {
            // The reserved tokens are read first, as in `state`.
            let reserved = budget.count(self.reserved.get());
            let counted = self.used_in(*budget, &periods).saturating_add(reserved);
            counted.saturating_sub(budget.limit.get())
        });
        excess.max().unwrap_or(0)
    }

    /// Returns the budget of which the fewest tokens are available.
    pub(super) fn tightest(&self, budgets: &[Budget], today: Date) -> Option<Shortage> {
        let periods = self.periods(today);
        let states = budgets.iter().map(|budget| self.state(*budget, &periods));
        states.min_by_key(|state| state.available)
    }

    /// Counts tokens as used. `reserved` of them were reserved.
    ///
    /// For a moment the tokens count twice, so that a request that starts meanwhile cannot reserve used tokens.
    pub(super) fn charge(&self, tokens: TokenCount, reserved: TokenCount) {
        self.used.add(tokens);
        self.reserved.subtract(reserved);
    }

    /// Gives back reserved tokens that were not used.
    pub(super) fn release(&self, tokens: TokenCount) {
        self.reserved.subtract(tokens);
    }

    /// Returns the used and the reserved tokens.
    #[cfg(test)]
    pub(super) fn counts(&self) -> [TokenCount; 2] {
        [self.used.get(), self.reserved.get()]
    }

    fn state(&self, budget: Budget, periods: &Periods) -> Shortage {
        // The reserved tokens are read first, so a token that is charged in between counts twice, but is never missed.
        let reserved = budget.count(self.reserved.get());
        let unused = budget
            .limit
            .get()
            .saturating_sub(self.used_in(budget, periods));
        Shortage {
            budget,
            unused,
            available: unused.saturating_sub(reserved),
        }
    }

    fn used_in(&self, budget: Budget, periods: &Periods) -> u64 {
        let before = match budget.period {
            BudgetPeriod::Day => periods.used_before_day,
            BudgetPeriod::Month => periods.used_before_month,
            BudgetPeriod::Total => TokenCount::default(),
        };
        budget.count(self.used.get().saturating_sub(before))
    }

    /// Locks the periods. Starts a new day or month if `today` is later than the stored date. If the clock was set
    /// back, the current periods continue until the next day.
    fn periods(&self, today: Date) -> MutexGuard<'_, Periods> {
        let mut periods = self.periods.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(date) = periods.date else {
            periods.date = Some(today);
            return periods;
        };
        if today > date {
            let used = self.used.get();
            periods.used_before_day = used;
            if today.first_of_month() > date {
                periods.used_before_month = used;
            }
        }
        periods.date = Some(today);
        periods
    }
}
