//! The tokens of a key's budgets that are reserved for one completion.

use jiff::civil::Date;

use super::{KeyBudgets, TokenCount, TokenNeed, today};
use crate::error::Error;

/// Number of tokens by which a reservation grows when a completion needs more than it reserved.
const GROWTH: u64 = 64;

/// Tokens that are reserved for one completion. Dropping the reservation gives back those that were not used.
#[derive(Debug)]
pub(crate) struct Reservation {
    budgets: KeyBudgets,
    left: TokenCount,
    /// True if the completion may need more tokens than were reserved.
    may_grow: bool,
}

impl Reservation {
    /// Reserves tokens.
    ///
    /// # Errors
    /// A budget does not allow the prompt and one token of its completion.
    pub(super) fn new(budgets: KeyBudgets, need: TokenNeed, today: Date) -> Result<Self, Error> {
        let minimum = need.completion.min(1);
        let wanted = TokenCount {
            prompt: need.prompt,
            completion: need.completion,
        };
        let reserved = budgets
            .usage
            .reserve(&budgets.budgets, wanted, minimum, today);
        let completion = reserved.map_err(|shortage| {
            let needed = TokenCount {
                completion: minimum,
                ..wanted
            };
            shortage.rejection(shortage.budget.count(needed), today)
        })?;
        Ok(Self {
            budgets,
            left: TokenCount {
                completion,
                ..wanted
            },
            may_grow: need.is_open_ended || completion < need.completion,
        })
    }

    /// Counts a prompt that a worker has started. If the prompt was not reserved and exceeds a budget, the completion
    /// gets fewer tokens.
    pub(crate) fn charge_prompt(&mut self, tokens: u64) {
        let reserved = TokenCount {
            completion: 0,
            ..self.left
        };
        self.left.prompt = 0;
        let used = TokenCount {
            prompt: tokens,
            completion: 0,
        };
        self.budgets.usage.charge(used, reserved);
        if tokens <= reserved.prompt {
            return;
        }
        let excess = self.budgets.usage.excess(&self.budgets.budgets, today());
        let given_back = excess.min(self.left.completion);
        if given_back > 0 {
            self.may_grow = true;
            self.give_back(given_back);
        }
    }

    /// Counts the prompt with the number of tokens that is reserved for it.
    pub(crate) fn charge_expected_prompt(&mut self) {
        self.charge_prompt(self.left.prompt);
    }

    /// Counts tokens of the completion, as many as the budgets allow. Returns their number.
    pub(crate) fn charge_completion(&mut self, tokens: u64) -> u64 {
        if tokens > self.left.completion {
            self.grow(tokens - self.left.completion);
        }
        let granted = tokens.min(self.left.completion);
        let charged = TokenCount {
            prompt: 0,
            completion: granted,
        };
        self.budgets.usage.charge(charged, charged);
        self.left.completion -= granted;
        granted
    }

    /// Counts tokens that were used without having been reserved.
    pub(crate) fn charge_unreserved(&self, tokens: TokenCount) {
        self.budgets.usage.charge(tokens, TokenCount::default());
    }

    /// Checks that the completion can have another token.
    ///
    /// # Errors
    /// No reserved token is left, the completion may need more, and the budgets have none.
    pub(crate) fn check_left(&mut self) -> Result<(), Error> {
        if !self.may_grow || self.left.completion > 0 {
            return Ok(());
        }
        self.grow(1);
        match self.left.completion {
            0 => Err(self.used_up()),
            _ => Ok(()),
        }
    }

    /// Returns the error of a completion that ends because a budget is used up.
    pub(crate) fn used_up(&self) -> Error {
        let KeyBudgets { budgets, usage } = &self.budgets;
        let today = today();
        let tightest = usage.tightest(budgets, today);
        tightest.map_or_else(Error::internal, |shortage| shortage.used_up(today))
    }

    /// Reserves `missing` tokens and [`GROWTH`] more, or as many as the budgets allow.
    fn grow(&mut self, missing: u64) {
        let KeyBudgets { budgets, usage } = &self.budgets;
        let wanted = TokenCount {
            prompt: 0,
            completion: missing.saturating_add(GROWTH),
        };
        self.left.completion += usage.reserve(budgets, wanted, 0, today()).unwrap_or(0);
    }

    /// Gives back tokens of the completion.
    fn give_back(&mut self, completion: u64) {
        self.left.completion -= completion;
        self.budgets.usage.release(TokenCount {
            prompt: 0,
            completion,
        });
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budgets.usage.release(self.left);
    }
}
