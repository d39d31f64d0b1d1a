//! Targets of a run: limits on measured values, and a verdict on each.

use std::fmt;

use serde::Serialize;

use crate::statistics::Spread;

/// One target and its verdict.
#[derive(Debug, Serialize)]
pub(crate) struct TargetResult {
    /// Name of the value that has a limit.
    pub(crate) target: String,
    /// Median of the value over the rounds.
    pub(crate) value: f64,
    pub(crate) spread: Spread,
    pub(crate) limit: f64,
    pub(crate) bound: Bound,
    /// Unit of the value. `×` stands for a ratio, `%` for a share.
    pub(crate) unit: &'static str,
    pub(crate) pass: bool,
}

/// Side of the limit on which the value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    AtLeast,
    AtMost,
}

impl Bound {
    pub(crate) fn sign(self) -> &'static str {
        match self {
            Self::AtLeast => "≥",
            Self::AtMost => "≤",
        }
    }
}

impl TargetResult {
    pub(crate) fn new(
        target: String,
        spread: Spread,
        bound: Bound,
        limit: f64,
        unit: &'static str,
    ) -> Self {
        let value = spread.median;
        Self {
            target,
            value,
            spread,
            limit,
            bound,
            unit,
            pass: match bound {
                Bound::AtLeast => value >= limit,
                Bound::AtMost => value <= limit,
            },
        }
    }
}

/// Formats the target as a line of a table: the verdict, the name, the median with the range of the rounds, and the
/// limit.
impl fmt::Display for TargetResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.pass { "pass" } else { "FAIL" };
        let Self {
            target,
            value,
            spread: Spread {
                lowest, highest, ..
            },
            limit,
            bound,
            unit,
            ..
        } = self;
        let bound = bound.sign();
        write!(
            f,
            "{verdict}  {target:<72}{value:>8.2} {unit:<3} ({lowest:.2} to {highest:.2}), {bound} {limit:.2}"
        )
    }
}
