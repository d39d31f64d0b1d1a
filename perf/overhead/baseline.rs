//! A run beside an older one: which ratios got worse by more than the rounds of either lie apart.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::statistics::Spread;
use super::targets::{Bound, Target};

/// Why a file is no older run.
#[derive(Debug, thiserror::Error)]
pub(super) enum BaselineError {
    #[error("--baseline {path}: {source}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("--baseline {path} is no run of this program's: {source}")]
    Form {
        path: String,
        #[source]
        source: serde_json::Error,
    },
}

/// An older run, of which only the targets are looked at.
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
    /// Reads a run that was written with `--json`.
    pub(super) fn read(path: &Path) -> Result<Self, BaselineError> {
        let name = || path.display().to_string();
        let text = fs::read_to_string(path).map_err(|source| BaselineError::Read {
            path: name(),
            source,
        })?;
        serde_json::from_str(&text).map_err(|source| BaselineError::Form {
            path: name(),
            source,
        })
    }

    /// What got worse, one line for each.
    pub(super) fn worse(&self, targets: &[Target]) -> Vec<String> {
        let known = targets.iter().filter_map(|target| {
            let old = self
                .targets
                .iter()
                .find(|old| old.target == target.target)?;
            Some((target, old.spread))
        });
        known
            .filter(|(target, old)| {
                let change = target.spread.median - old.median;
                let worsening = match target.bound {
                    Bound::AtLeast => -change,
                    Bound::AtMost => change,
                };
                worsening > target.spread.width().max(old.width())
            })
            .map(|(target, old)| {
                let (name, unit) = (&target.target, target.unit);
                let (new, old) = (target.spread.median, old.median);
                format!("{name}: {new:.2} {unit}, and it was {old:.2} {unit}")
            })
            .collect()
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

    fn target(bound: Bound, spread: Spread) -> Target {
        Target {
            target: "it".to_owned(),
            value: spread.median,
            spread,
            limit: 0.0,
            bound,
            unit: "×",
            pass: true,
        }
    }

    #[test]
    fn only_what_is_worse_by_more_than_the_rounds_lie_apart_is_told() {
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
            let worse = baseline.worse(&[target(bound, now)]);
            assert_eq!(!worse.is_empty(), is_worse, "{bound:?} {now:?}");
        }
    }
}
