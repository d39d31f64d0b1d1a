//! Medians over rounds, with their spread.

use serde::{Deserialize, Serialize};

/// A value over the rounds of a run.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Spread {
    /// The middle one; between the two middle ones where their number is even.
    pub(crate) median: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

impl Spread {
    /// The spread of these values; `None` of nothing, or where one is no number.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        let (lowest, highest) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self {
            median,
            lowest,
            highest,
        })
    }

    /// How far the rounds lie apart.
    pub(super) fn width(self) -> f64 {
        self.highest - self.lowest
    }
}

/// A count as a number to divide; exact up to 2^53, far above any count of a run.
pub(crate) fn count(count: u64) -> f64 {
    let (high, low) = (count >> 32, count & u64::from(u32::MAX));
    let part = |part: u64| f64::from(u32::try_from(part).expect("it is half of it"));
    part(high) * 4_294_967_296.0 + part(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_middle_the_lowest_and_the_highest() {
        let of = |values: &[f64]| Spread::of(values.to_vec());
        let (lowest, highest) = (1.0, 9.0);
        let median = 3.0;
        let odd = Spread {
            median,
            lowest,
            highest,
        };
        assert_eq!(of(&[9.0, 1.0, 3.0]), Some(odd));
        assert_eq!(of(&[9.0, 1.0, 2.0, 4.0]), Some(odd));
        let one = of(&[7.0]).unwrap();
        assert_eq!(
            (one.median, one.lowest, one.highest, one.width()),
            (7.0, 7.0, 7.0, 0.0)
        );
        assert_eq!(of(&[-1.0, -3.0]).map(Spread::width), Some(2.0));
        let known: Vec<_> = (1..=1_001).rev().map(f64::from).collect();
        assert_eq!(of(&known).unwrap().median, 501.0);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn a_count_loses_nothing() {
        assert_eq!(count(0), 0.0);
        assert_eq!(count(1 << 40), 1_099_511_627_776.0);
        assert_eq!(count(u64::from(u32::MAX)), 4_294_967_295.0);
    }
}
