//! Percentiles of times, and medians over rounds, for all reports.

use std::fmt;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Percentiles of a time, in microseconds. The p-th percentile of n values is the one at rank ⌈p·n/100⌉ in ascending
/// order, to the three digits that a histogram keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl Percentiles {
    /// Returns the percentiles of times in nanoseconds. All are 0 if the histogram is empty.
    pub(crate) fn from_histogram(times: &Histogram<u64>) -> Self {
        let at = |percent| percentile_us(times, percent);
        Self {
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p999: at(99.9),
            max: to_us(times.max()),
        }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            p50, p90, p99, max, ..
        } = self;
        write!(
            f,
            "p50 {p50:.1} µs, p90 {p90:.1} µs, p99 {p99:.1} µs, max {max:.1} µs"
        )
    }
}

/// Returns a percentile of times in nanoseconds, in microseconds.
pub(crate) fn percentile_us(times: &Histogram<u64>, percent: f64) -> f64 {
    to_us(times.value_at_quantile(percent / 100.0))
}

/// Converts nanoseconds to microseconds.
pub(crate) fn to_us(ns: u64) -> f64 {
    count_to_f64(ns) / 1e3
}

/// Median, lowest and highest of a value over the rounds of a run.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Spread {
    /// Median. If the number of rounds is even, it is the mean of the two middle values.
    pub(crate) median: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
}

impl Spread {
    /// Returns the spread of a value over the rounds of a run. `None` if the value of any round is unknown.
    pub(crate) fn from_rounds(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let values: Option<Vec<_>> = values.collect();
        Self::from_values(values?)
    }

    /// Returns the spread of these values. `None` if there are no values, or if a value is not finite.
    pub(crate) fn from_values(mut values: Vec<f64>) -> Option<Self> {
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

    /// Returns the difference between the highest and the lowest value.
    pub(crate) fn width(self) -> f64 {
        self.highest - self.lowest
    }
}

/// Converts a count to `f64`, exactly up to 2^53.
pub(crate) fn count_to_f64(count: u64) -> f64 {
    let (high, low) = (count >> 32, count & u64::from(u32::MAX));
    let part = |part: u64| f64::from(u32::try_from(part).expect("half of a u64 fits into a u32"));
    part(high) * 4_294_967_296.0 + part(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_at_the_nearest_rank() {
        let mut times = Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        times.record(300).unwrap();
        times.record(600).unwrap();
        let text = "p50 0.3 µs, p90 0.6 µs, p99 0.6 µs, max 0.6 µs";
        assert_eq!(Percentiles::from_histogram(&times).to_string(), text);
    }

    #[test]
    fn a_spread_is_the_median_the_lowest_and_the_highest() {
        let of = |values: &[f64]| Spread::from_values(values.to_vec());
        let odd = Spread {
            median: 3.0,
            lowest: 1.0,
            highest: 9.0,
        };
        assert_eq!(of(&[9.0, 1.0, 3.0]), Some(odd));
        assert_eq!(of(&[9.0, 1.0, 2.0, 4.0]), Some(odd));
        assert_eq!(of(&[-1.0, -3.0]).map(Spread::width), Some(2.0));
        assert_eq!((of(&[]), of(&[1.0, f64::NAN])), (None, None));
    }

    #[test]
    fn there_is_no_spread_over_rounds_if_one_value_is_unknown() {
        let of = |rounds: &[Option<f64>]| Spread::from_rounds(rounds.iter().copied());
        let widths = of(&[Some(1.0), Some(3.0)]).map(Spread::width);
        assert_eq!(widths, Some(2.0));
        assert_eq!((of(&[Some(1.0), None]), of(&[])), (None, None));
    }

    #[test]
    fn a_count_keeps_every_digit() {
        assert_eq!(count_to_f64(1 << 40), 1_099_511_627_776.0);
    }
}
