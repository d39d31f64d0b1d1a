//! The reference's own figures of one stream. They know nothing of doors.

use std::fmt;
use std::time::Duration;

use crate::percentiles::{milliseconds, signed_difference};
use crate::stamp::Stamp;

/// One token, as the client received it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenSample {
    /// Its index, from its text.
    pub(crate) index: u32,
    /// When the read that brought it returned, in nanoseconds of CLOCK_MONOTONIC.
    pub(crate) received_ns: u64,
    /// What its device says of when it was emitted.
    pub(crate) stamp: Option<Stamp>,
}

/// The figures of the reference system's performance test, by its names and its definitions.
#[derive(Debug, PartialEq)]
pub(crate) struct StreamingMetrics {
    /// How many tokens came.
    pub(crate) received_token_count: u32,
    /// From the request to the last token.
    pub(crate) total_streaming_time_ms: f64,
    /// From the first token to the last, over one less than their number. A delay that is the same
    /// for all of them cancels out.
    pub(crate) mean_receive_interval_ms: f64,
    /// One less than the number of tokens, over the total time.
    pub(crate) throughput_tokens_per_second: f64,
}

impl StreamingMetrics {
    /// The figures of a stream whose request was sent then. `None` with fewer than two tokens, for
    /// there is no interval.
    pub(crate) fn of(samples: &[TokenSample], requested_ns: u64) -> Option<Self> {
        let (first, last) = (samples.first()?, samples.last()?);
        let received_token_count = u32::try_from(samples.len()).ok()?;
        let intervals = f64::from(received_token_count - 1);
        if intervals == 0.0 {
            return None;
        }
        let total = milliseconds(signed_difference(last.received_ns, requested_ns));
        let streaming = milliseconds(signed_difference(last.received_ns, first.received_ns));
        Some(Self {
            received_token_count,
            total_streaming_time_ms: total,
            mean_receive_interval_ms: streaming / intervals,
            throughput_tokens_per_second: intervals / (total / 1e3),
        })
    }

    /// How much longer the mean interval is than the one that the test runner keeps.
    pub(crate) fn calculate_overhead_ms(&self, interval: Duration) -> f64 {
        self.mean_receive_interval_ms - interval.as_secs_f64() * 1e3
    }
}

impl fmt::Display for StreamingMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "StreamingMetrics(received_tokens={}, total_streaming_time_ms={:.2}, \
             mean_receive_interval_ms={:.2}, throughput_tokens_per_second={:.2})",
            self.received_token_count,
            self.total_streaming_time_ms,
            self.mean_receive_interval_ms,
            self.throughput_tokens_per_second,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn sample(index: u32, received_ns: u64) -> TokenSample {
        TokenSample {
            index,
            received_ns,
            stamp: None,
        }
    }

    #[test]
    fn the_references_figures_are_as_it_defines_them() {
        let samples = [
            sample(0, 130 * MS),
            sample(1, 151 * MS),
            sample(2, 175 * MS),
        ];
        let metrics = StreamingMetrics::of(&samples, 100 * MS).unwrap();
        assert_eq!(metrics.received_token_count, 3);
        assert_eq!(metrics.total_streaming_time_ms, 75.0);
        assert_eq!(metrics.mean_receive_interval_ms, 22.5);
        assert!((metrics.throughput_tokens_per_second - 2.0 / 0.075).abs() < 1e-9);
        assert_eq!(
            metrics.calculate_overhead_ms(Duration::from_millis(20)),
            2.5
        );
        assert_eq!(
            metrics.to_string(),
            "StreamingMetrics(received_tokens=3, total_streaming_time_ms=75.00, \
             mean_receive_interval_ms=22.50, throughput_tokens_per_second=26.67)"
        );
    }

    #[test]
    fn one_token_has_no_interval() {
        assert_eq!(StreamingMetrics::of(&[sample(0, 1)], 0), None);
        assert_eq!(StreamingMetrics::of(&[], 0), None);
    }
}
