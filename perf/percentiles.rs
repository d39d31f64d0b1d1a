//! The distribution of a time over the tokens of a stream.

use std::fmt;
use std::time::Duration;

/// The distribution of a time, by nearest rank: the p-th percentile of n values is the one in place
/// ⌈p·n/100⌉ when they are sorted, so that it is always a value that occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Percentiles {
    /// How many values there were.
    pub(crate) count: usize,
    pub(crate) p50_ns: i64,
    pub(crate) p90_ns: i64,
    pub(crate) p99_ns: i64,
    pub(crate) max_ns: i64,
}

impl Percentiles {
    /// The distribution of `later - earlier`; `None` of nothing.
    pub(crate) fn of_differences(pairs: impl Iterator<Item = (u64, u64)>) -> Option<Self> {
        Self::of(
            pairs
                .map(|(later, earlier)| signed_difference(later, earlier))
                .collect(),
        )
    }

    fn of(mut values_ns: Vec<i64>) -> Option<Self> {
        values_ns.sort_unstable();
        let max_ns = *values_ns.last()?;
        let percentile = |percent: usize| {
            let rank = (values_ns.len() * percent).div_ceil(100);
            values_ns[rank.max(1) - 1]
        };
        Some(Self {
            count: values_ns.len(),
            p50_ns: percentile(50),
            p90_ns: percentile(90),
            p99_ns: percentile(99),
            max_ns,
        })
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns| milliseconds(ns) * 1e3;
        write!(
            f,
            "p50 {:.1} µs, p90 {:.1} µs, p99 {:.1} µs, max {:.1} µs",
            us(self.p50_ns),
            us(self.p90_ns),
            us(self.p99_ns),
            us(self.max_ns),
        )
    }
}

/// `later - earlier`, in nanoseconds.
pub(crate) fn signed_difference(later: u64, earlier: u64) -> i64 {
    let difference = later.abs_diff(earlier);
    let difference = i64::try_from(difference).unwrap_or(i64::MAX);
    if later < earlier {
        -difference
    } else {
        difference
    }
}

/// Nanoseconds as milliseconds.
pub(crate) fn milliseconds(ns: i64) -> f64 {
    let magnitude = Duration::from_nanos(ns.unsigned_abs()).as_secs_f64() * 1e3;
    if ns < 0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_values_of_the_nearest_rank() {
        let of_a_hundred = Percentiles {
            count: 100,
            p50_ns: 50,
            p90_ns: 90,
            p99_ns: 99,
            max_ns: 100,
        };
        assert_eq!(
            Percentiles::of((1..=100).rev().collect()),
            Some(of_a_hundred)
        );
        let of_five = Percentiles {
            count: 5,
            p50_ns: 30,
            p90_ns: 50,
            p99_ns: 50,
            max_ns: 50,
        };
        assert_eq!(Percentiles::of(vec![50, 10, 40, 20, 30]), Some(of_five));
        assert_eq!(Percentiles::of(vec![7]).unwrap().p50_ns, 7);
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}
