//! Inter-token latency and rate of running streams within an interval of time.

use crate::statistics::count_to_f64;

/// An interval in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interval {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Interval {
    /// Returns the 99th percentile, in milliseconds, of the inter-token latencies that overlap the interval. A latency
    /// that only partly overlaps it counts in full. The percentile is the value at rank ⌈99·n/100⌉ of n values in
    /// ascending order, or 0 if there are none.
    pub(super) fn gap_p99_ms<'a>(self, streams: impl Iterator<Item = &'a [u64]>) -> f64 {
        let gaps = streams.flat_map(|token_ns| token_ns.windows(2));
        let gaps = gaps.map(|gap| (gap[0], gap[1]));
        let gaps = gaps.filter(|(from, to)| *from < self.end && *to > self.start);
        let mut gaps: Vec<_> = gaps.map(|(from, to)| to - from).collect();
        gaps.sort_unstable();
        let rank = (gaps.len() * 99).div_ceil(100);
        let gap = rank.checked_sub(1).and_then(|at| gaps.get(at));
        count_to_f64(gap.copied().unwrap_or(0)) / 1e6
    }

    /// Returns the number of tokens per second that arrived within the interval.
    pub(super) fn rate<'a>(self, streams: impl Iterator<Item = &'a [u64]>) -> f64 {
        let within = |ns: &&u64| (self.start..self.end).contains(*ns);
        let tokens = streams.flatten().filter(within).count();
        let seconds = count_to_f64(self.end.saturating_sub(self.start)) / 1e9;
        count_to_f64(u64::try_from(tokens).unwrap_or(u64::MAX)) / seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Interval = Interval {
        start: 10_000_000,
        end: 20_000_000,
    };

    #[test]
    fn a_pause_that_reaches_into_the_interval_counts_whole() {
        let p99 = |token_ns: &[u64]| INTERVAL.gap_p99_ms([token_ns].into_iter());
        assert_eq!(p99(&[1_000_000, 12_000_000, 13_000_000]), 11.0);
        assert_eq!(p99(&[19_000_000, 39_000_000]), 20.0);
        assert_eq!(p99(&[1_000_000, 99_000_000]), 98.0);
        // A pause that ends where the interval starts, and one that starts where it ends.
        assert_eq!(p99(&[1_000_000, 10_000_000]), 0.0);
        assert_eq!(p99(&[20_000_000, 90_000_000]), 0.0);
    }

    #[test]
    fn one_pause_of_a_hundred_is_above_the_percentile() {
        let long = [9_000_000, 15_000_000];
        let short: Vec<_> = (0..100).map(|at| 15_000_000 + at * 10_000).collect();
        let p99 = |streams: &[&[u64]]| INTERVAL.gap_p99_ms(streams.iter().copied());
        assert_eq!(p99(&[&long, &short]), 0.01);
        assert_eq!(p99(&[&long, &long, &short]), 6.0);
    }

    #[test]
    fn a_rate_counts_the_tokens_within_the_interval() {
        let streams = [[9_000_000, 10_000_000], [19_000_000, 20_000_000]];
        let rate = INTERVAL.rate(streams.iter().map(|token_ns| token_ns.as_slice()));
        assert_eq!(rate, 200.0);
    }
}
