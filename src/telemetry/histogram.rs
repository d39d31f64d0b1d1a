//! Histograms with fixed buckets, in Prometheus's text format.
//!
//! The histograms of the exporter crate keep every value until the metrics are read. These only keep counts.

use std::fmt::{self, Write};

/// Upper bound of a bucket: in nanoseconds, and in seconds as Prometheus prints it.
pub(super) type Bound = (u64, &'static str);

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Bounds of the histograms for the time to the first token and the time in the queue. They equal the bounds of
/// `vllm:time_to_first_token_seconds`, up to 160 s.
pub(super) const WAIT_TIME_BOUNDS: [Bound; 20] = [
    (MS, "0.001"),
    (5 * MS, "0.005"),
    (10 * MS, "0.01"),
    (20 * MS, "0.02"),
    (40 * MS, "0.04"),
    (60 * MS, "0.06"),
    (80 * MS, "0.08"),
    (100 * MS, "0.1"),
    (250 * MS, "0.25"),
    (500 * MS, "0.5"),
    (750 * MS, "0.75"),
    (SECOND, "1"),
    (2_500 * MS, "2.5"),
    (5 * SECOND, "5"),
    (7_500 * MS, "7.5"),
    (10 * SECOND, "10"),
    (20 * SECOND, "20"),
    (40 * SECOND, "40"),
    (80 * SECOND, "80"),
    (160 * SECOND, "160"),
];

/// Bounds of the histogram for the time between tokens. They equal the bounds of `vllm:inter_token_latency_seconds`,
/// with shorter ones added for fast models.
pub(super) const TOKEN_GAP_BOUNDS: [Bound; 18] = [
    (MS, "0.001"),
    (2_500_000, "0.0025"),
    (5 * MS, "0.005"),
    (10 * MS, "0.01"),
    (25 * MS, "0.025"),
    (50 * MS, "0.05"),
    (75 * MS, "0.075"),
    (100 * MS, "0.1"),
    (150 * MS, "0.15"),
    (200 * MS, "0.2"),
    (300 * MS, "0.3"),
    (400 * MS, "0.4"),
    (500 * MS, "0.5"),
    (750 * MS, "0.75"),
    (SECOND, "1"),
    (2_500 * MS, "2.5"),
    (5 * SECOND, "5"),
    (10 * SECOND, "10"),
];

/// Bounds of the histogram for the duration of a request. They equal the bounds of `vllm:e2e_request_latency_seconds`
/// up to 960 s, with shorter ones added.
pub(super) const DURATION_BOUNDS: [Bound; 20] = [
    (10 * MS, "0.01"),
    (50 * MS, "0.05"),
    (100 * MS, "0.1"),
    (300 * MS, "0.3"),
    (500 * MS, "0.5"),
    (800 * MS, "0.8"),
    (SECOND, "1"),
    (1_500 * MS, "1.5"),
    (2_000 * MS, "2"),
    (2_500 * MS, "2.5"),
    (5 * SECOND, "5"),
    (10 * SECOND, "10"),
    (15 * SECOND, "15"),
    (20 * SECOND, "20"),
    (30 * SECOND, "30"),
    (60 * SECOND, "60"),
    (120 * SECOND, "120"),
    (240 * SECOND, "240"),
    (480 * SECOND, "480"),
    (960 * SECOND, "960"),
];

/// The counts of a histogram.
pub(super) struct Buckets {
    bounds: &'static [Bound],
    /// One count per bound, and one for the values above all bounds. Empty until the first value.
    counts: Vec<u64>,
    sum_ns: u64,
}

impl Buckets {
    pub(super) fn new(bounds: &'static [Bound]) -> Self {
        Self {
            bounds,
            counts: Vec::new(),
            sum_ns: 0,
        }
    }

    /// Counts a value `count` times.
    pub(super) fn add(&mut self, value_ns: u64, count: u64) {
        let bucket = self.bounds.partition_point(|(bound, _)| *bound < value_ns);
        self.reserve_counts();
        self.counts[bucket] += count;
        self.sum_ns = self.sum_ns.saturating_add(value_ns.saturating_mul(count));
    }

    /// Adds the counts of another histogram with the same bounds.
    pub(super) fn merge(&mut self, other: &Self) {
        if other.counts.is_empty() {
            return;
        }
        self.reserve_counts();
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    fn reserve_counts(&mut self) {
        if self.counts.is_empty() {
            self.counts = vec![0; self.bounds.len() + 1];
        }
    }

    pub(super) fn clear(&mut self) {
        self.counts.fill(0);
        self.sum_ns = 0;
    }

    /// Number of recorded values.
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the recorded values.
    #[cfg(test)]
    pub(super) fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// Writes the time series for one set of labels.
    pub(super) fn write(&self, name: &str, labels: &str, out: &mut String) -> fmt::Result {
        let bounds = self.bounds.iter().map(|(_, seconds)| *seconds);
        let mut count = 0;
        let counts = self.counts.iter().chain(std::iter::repeat(&0));
        for (bound, bucket) in bounds.chain(["+Inf"]).zip(counts) {
            count += bucket;
            writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}")?;
        }
        let (seconds, rest) = (self.sum_ns / SECOND, self.sum_ns % SECOND);
        writeln!(out, "{name}_sum{{{labels}}} {seconds}.{rest:09}")?;
        writeln!(out, "{name}_count{{{labels}}} {count}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_is_shown_in_seconds_as_it_is_compared_in_nanoseconds() {
        for bounds in [&WAIT_TIME_BOUNDS[..], &TOKEN_GAP_BOUNDS, &DURATION_BOUNDS] {
            assert!(bounds.is_sorted_by_key(|(bound, _)| *bound));
            for (bound, seconds) in bounds {
                let shown: f64 = seconds.parse().expect("a number");
                let shown = std::time::Duration::from_secs_f64(shown);
                assert_eq!(shown.as_nanos(), u128::from(*bound), "{seconds}");
            }
        }
    }

    #[test]
    fn a_histogram_without_values_has_every_bucket_at_zero() {
        let mut text = String::new();
        let written = Buckets::new(&TOKEN_GAP_BOUNDS).write("m", "a=\"b\"", &mut text);
        written.expect("writing to a `String` cannot fail");
        let is_zero = |line: &str| line.ends_with(" 0") || line.ends_with(" 0.000000000");
        assert!(text.lines().all(is_zero), "{text}");
        assert_eq!(text.matches("m_bucket").count(), TOKEN_GAP_BOUNDS.len() + 1);
    }

    #[test]
    fn a_value_counts_in_every_bucket_whose_bound_it_does_not_exceed() {
        let mut buckets = Buckets::new(&TOKEN_GAP_BOUNDS);
        buckets.add(MS, 2);
        buckets.add(MS + 1, 1);
        buckets.add(100 * SECOND, 1);
        let mut text = String::new();
        let written = buckets.write("m", "a=\"b\"", &mut text);
        written.expect("writing to a `String` cannot fail");
        for line in [
            "m_bucket{a=\"b\",le=\"0.001\"} 2",
            "m_bucket{a=\"b\",le=\"0.0025\"} 3",
            "m_bucket{a=\"b\",le=\"+Inf\"} 4",
            "m_sum{a=\"b\"} 100.003000001",
            "m_count{a=\"b\"} 4",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
    }
}
