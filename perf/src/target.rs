//! Targets of a run: limits on measured values, and a verdict on each.

use std::fmt;
use std::io::{self, Write};

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

/// Returns true if a target is missed.
pub(crate) fn has_missed(targets: &[TargetResult]) -> bool {
    targets.iter().any(|target| !target.pass)
}

/// Prints the targets below the tables of a run. Prints nothing if there are none.
pub(crate) fn write_targets(targets: &[TargetResult], out: &mut dyn Write) -> io::Result<()> {
    if !targets.is_empty() {
        writeln!(out, "\nTargets (median of the rounds, lowest to highest)")?;
    }
    for target in targets {
        writeln!(out, "  {target}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_a_heading_if_there_are_any() {
        let written = |targets: &[TargetResult]| {
            let mut out = Vec::new();
            write_targets(targets, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(written(&[]), "");
        let spread = Spread {
            median: 1.5,
            lowest: 1.0,
            highest: 2.0,
        };
        let target = TargetResult::new("time".to_owned(), spread, Bound::AtMost, 1.0, "ms");
        let text = written(&[target]);
        let lines: Vec<_> = text.lines().collect();
        let ["", heading, line] = lines[..] else {
            panic!("{text}");
        };
        assert_eq!(heading, "Targets (median of the rounds, lowest to highest)");
        assert!(line.starts_with("  FAIL  time "), "{line}");
    }
}
