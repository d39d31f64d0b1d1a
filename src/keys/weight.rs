//! The weight of a key: its share of slots and queue, relative to other keys.

use std::fmt;
use std::str::FromStr;

/// Largest weight of a key.
const MAX_WEIGHT: u32 = 100;

/// Weight of a key, from 1 to 100. While both have requests in the queue, a key with weight 4 gets four times the slots
/// of a key with weight 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Weight(u32);

impl Weight {
    /// Returns the number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self(1)
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Error for a number that is not a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be a whole number from 1 to {MAX_WEIGHT}")]
pub struct InvalidWeight;

impl TryFrom<i64> for Weight {
    type Error = InvalidWeight;

    fn try_from(number: i64) -> Result<Self, InvalidWeight> {
        let weight = u32::try_from(number).map_err(|_| InvalidWeight)?;
        let is_valid = (1..=MAX_WEIGHT).contains(&weight);
        is_valid.then_some(Self(weight)).ok_or(InvalidWeight)
    }
}

impl FromStr for Weight {
    type Err = InvalidWeight;

    fn from_str(text: &str) -> Result<Self, InvalidWeight> {
        let number: i64 = text.parse().map_err(|_| InvalidWeight)?;
        Self::try_from(number)
    }
}
