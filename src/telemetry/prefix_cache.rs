//! Metrics of the prefix caches of all workers.

use metrics::{Counter, Gauge, Key, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::RECORDER_METADATA;
use crate::runner::PrefixCacheStats;

const HITS: &str = "tokenway_prefix_cache_hits_total";
const CACHED_TOKENS: &str = "tokenway_prefix_cache_tokens_total";
const EVICTIONS: &str = "tokenway_prefix_cache_evictions_total";
const BYTES: &str = "tokenway_prefix_cache_bytes";

/// The metrics of all prefix caches together.
pub struct PrefixCacheMetrics {
    hits: Counter,
    cached_tokens: Counter,
    evictions: Counter,
    bytes: Gauge,
}

impl PrefixCacheMetrics {
    pub(super) fn new(recorder: &PrometheusRecorder) -> Self {
        let counter =
            |name| recorder.register_counter(&Key::from_static_name(name), &RECORDER_METADATA);
        let bytes = recorder.register_gauge(&Key::from_static_name(BYTES), &RECORDER_METADATA);
        bytes.set(0.0);
        Self {
            hits: counter(HITS),
            cached_tokens: counter(CACHED_TOKENS),
            evictions: counter(EVICTIONS),
            bytes,
        }
    }

    /// Counts the start of a sequence that reuses `cached_tokens` tokens of its prompt, possibly none.
    pub(crate) fn count_start(&self, cached_tokens: u32) {
        if cached_tokens > 0 {
            self.hits.increment(1);
            self.cached_tokens.increment(cached_tokens.into());
        }
    }

    /// Creates the meter of one worker's prefix cache, for a worker that has just loaded its model.
    pub(crate) fn meter(&self) -> PrefixCacheMeter {
        PrefixCacheMeter {
            evictions: self.evictions.clone(),
            bytes: self.bytes.clone(),
            last: PrefixCacheStats::default(),
        }
    }
}

/// Adds one worker's prefix cache to the metrics. Dropping the meter removes the cache's bytes from the gauge.
pub(crate) struct PrefixCacheMeter {
    evictions: Counter,
    bytes: Gauge,
    last: PrefixCacheStats,
}

impl PrefixCacheMeter {
    /// Records the current state of the cache.
    pub(crate) fn record(&mut self, stats: PrefixCacheStats) {
        let last = std::mem::replace(&mut self.last, stats);
        if last == stats {
            return;
        }
        self.evictions
            .increment(stats.evictions.saturating_sub(last.evictions));
        self.bytes
            .increment(as_gauge(stats.bytes) - as_gauge(last.bytes));
    }
}

impl Drop for PrefixCacheMeter {
    fn drop(&mut self) {
        self.bytes.decrement(as_gauge(self.last.bytes));
    }
}

/// Converts a number of bytes to a gauge's value. Exact up to 2^53.
fn as_gauge(bytes: u64) -> f64 {
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).map_or(0.0, f64::from);
    half(bytes >> 32) * 2_f64.powi(32) + half(bytes)
}

/// Describes the metrics of prefix caches.
pub(super) fn describe(recorder: &PrometheusRecorder) {
    for (name, text) in [
        (HITS, "Sequences that reuse tokens of another sequence."),
        (
            CACHED_TOKENS,
            "Prompt tokens that sequences were expected to reuse when they started.",
        ),
        (
            EVICTIONS,
            "Sequences whose computed tokens were dropped from a prefix cache to make room.",
        ),
    ] {
        recorder.describe_counter(name.into(), Some(Unit::Count), SharedString::from(text));
    }
    recorder.describe_gauge(
        BYTES.into(),
        Some(Unit::Bytes),
        "Memory of the prefix caches outside the slots.".into(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Telemetry;

    fn value(telemetry: &Telemetry, name: &str) -> String {
        let text = telemetry.render();
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        lines.next().unwrap_or_default().trim().to_owned()
    }

    #[test]
    fn the_gauge_sums_the_caches_of_all_workers_and_forgets_a_lost_one() {
        let telemetry = Telemetry::new();
        let stats = |bytes, evictions| PrefixCacheStats { bytes, evictions };
        let mut first = telemetry.prefix_cache.meter();
        let mut second = telemetry.prefix_cache.meter();
        first.record(stats(100, 0));
        second.record(stats(50, 2));
        second.record(stats(30, 3));
        assert_eq!(value(&telemetry, BYTES), "130");
        assert_eq!(value(&telemetry, EVICTIONS), "3");
        drop(first);
        assert_eq!(value(&telemetry, BYTES), "30");
    }

    #[test]
    fn only_a_sequence_that_reuses_tokens_is_a_hit() {
        let telemetry = Telemetry::new();
        telemetry.prefix_cache.count_start(0);
        telemetry.prefix_cache.count_start(7);
        assert_eq!(value(&telemetry, HITS), "1");
        assert_eq!(value(&telemetry, CACHED_TOKENS), "7");
    }
}
