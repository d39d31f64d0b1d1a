//! Comparison with an older run: finds ratios that got worse by more than the spread of the rounds in either run.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use crate::statistics::Spread;
use crate::target::{Bound, TargetResult};

/// Targets and values of an older run.
#[derive(Deserialize)]
pub(super) struct Baseline {
    targets: Vec<OldTarget>,
}

#[derive(Deserialize)]
struct OldTarget {
    target: String,
    spread: Spread,
}

impl Baseline {
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let flag = format!("--baseline {}", path.display());
        let text = fs::read_to_string(path).with_context(|| flag.clone())?;
        serde_json::from_str(&text)
            .with_context(|| format!("{flag} was not written by `overhead --json`"))
    }

    pub(super) fn list_regressions(&self, targets: &[TargetResult]) -> Vec<String> {
        let worse = targets.iter().filter_map(|target| {
            let mut old = self.targets.iter();
            let old = old.find(|old| old.target == target.target)?.spread;
            let change = target.spread.median - old.median;
            let worsening = match target.bound {
                Bound::AtLeast => -change,
                Bound::AtMost => change,
            };
            let (name, unit) = (&target.target, target.unit);
            let (new, before) = (target.spread.median, old.median);
            (worsening > target.spread.width().max(old.width()))
                .then(|| format!("{name}: {new:.2} {unit}, and it was {before:.2} {unit}"))
        });
        worse.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(lowest: f64, median: f64, highest: f64) -> Spread {
        Spread {
            median,
            lowest,
            highest,
        }
    }

    #[test]
    fn only_a_change_that_exceeds_the_spread_of_the_rounds_is_worse() {
        let old = OldTarget {
            target: "it".to_owned(),
            spread: spread(0.9, 1.0, 1.1),
        };
        let baseline = Baseline { targets: vec![old] };
        for (bound, now, is_worse) in [
            (Bound::AtLeast, spread(0.7, 0.7, 0.7), true),
            (Bound::AtLeast, spread(0.85, 0.85, 0.85), false),
            (Bound::AtLeast, spread(0.4, 0.7, 0.9), false),
            (Bound::AtLeast, spread(2.0, 2.0, 2.0), false),
            (Bound::AtMost, spread(1.3, 1.3, 1.3), true),
            (Bound::AtMost, spread(0.5, 0.5, 0.5), false),
        ] {
            let target = TargetResult::new("it".to_owned(), now, bound, 0.0, "×");
            let worse = baseline.list_regressions(&[target]);
            assert_eq!(!worse.is_empty(), is_worse, "{bound:?} {now:?}");
        }
    }
}
