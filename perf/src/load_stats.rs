//! Counts and times of a load: how many tokens arrived, how fast, and how late.

use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};
use tokenway::runner::monotonic_ns;

use crate::fault::Fault;
use crate::statistics::count_to_f64;
use crate::timestamps::TokenTimestamps;

/// Longest time that a histogram records exactly, and number of significant digits that a histogram keeps.
const MAX_RECORDED_NS: u64 = 60_000_000_000;
const HISTOGRAM_DIGITS: u8 = 3;
/// Number of distinct faults that are listed. Further faults are only counted.
const LISTED_FAULTS: usize = 5;

/// Counts and times of one load, from its start.
#[derive(Debug, Default)]
pub(crate) struct LoadStats {
    pub(crate) tokens: u64,
    /// Number of requests whose tokens all arrived.
    pub(crate) requests: u64,
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
    /// Total size of the lines or messages with tokens, in bytes, without response heads and HTTP/2 frames.
    pub(crate) token_bytes: u64,
    /// Number of requests whose first token arrived.
    pub(crate) started: u64,
    /// Number of gRPC requests whose response headers arrived. The server sends the headers before it has a free slot.
    pub(crate) answered: u64,
    /// Time from the start of the load to the last token.
    pub(crate) elapsed_ns: u64,
    /// Share of one processor that the load generator used. Near 1, the load generator may be the bottleneck.
    pub(crate) load_share: f64,
    pub(crate) times: LatencyHistograms,
    /// Number of tokens with a timestamp of another machine's clock. Their times are not recorded.
    pub(crate) foreign_stamps: u64,
    pub(crate) fault_count: u32,
    /// The first [`LISTED_FAULTS`] distinct faults.
    pub(crate) faults: Vec<String>,
    started_ns: u64,
    started_cpu: Duration,
    last_token_ns: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Rates {
    pub(crate) tokens: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) requests_per_second: f64,
    pub(crate) tokens_per_read: f64,
    pub(crate) bytes_per_token: f64,
}

/// Histograms of times in nanoseconds. In JSON, a histogram is a list of pairs: a time, and the number of its
/// occurrences.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LatencyHistograms {
    /// Time from the emission of a token by the device to the read that returned the token.
    #[serde(serialize_with = "serialize_histogram")]
    pub(crate) one_way: Histogram<u64>,
    /// Time from the due time of a token to the read that returned the token.
    #[serde(rename = "schedule_lateness", serialize_with = "serialize_histogram")]
    pub(crate) lateness: Histogram<u64>,
    /// Time from the due time of a token to its emission, which is the device's own delay.
    #[serde(rename = "runner_lateness", serialize_with = "serialize_histogram")]
    pub(crate) runner: Histogram<u64>,
    /// Time from the due time of a stream's start to its start, which is the load generator's own delay.
    #[serde(rename = "sender_lateness", serialize_with = "serialize_histogram")]
    pub(crate) sender: Histogram<u64>,
    /// Time from the due time of a request to the read that returned its first token.
    #[serde(serialize_with = "serialize_histogram")]
    pub(crate) ttft: Histogram<u64>,
    /// Time between the reads that returned two consecutive tokens of a stream.
    #[serde(rename = "inter_token", serialize_with = "serialize_histogram")]
    pub(crate) gaps: Histogram<u64>,
    /// Time per output token of each request: (last token − first token) / (tokens − 1).
    #[serde(
        rename = "time_per_output_token",
        serialize_with = "serialize_histogram"
    )]
    pub(crate) tpot: Histogram<u64>,
}

fn serialize_histogram<S: Serializer>(
    times: &Histogram<u64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let recorded = times.iter_recorded();
    serializer
        .collect_seq(recorded.map(|value| (value.value_iterated_to(), value.count_at_value())))
}

/// Availability of a server's timestamps. One-way latency cannot be computed without them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TimestampStatus {
    #[serde(rename = "not_asked")]
    NotRequested,
    /// Timestamps were requested, but the server sent none.
    Absent,
    /// The timestamps come from another machine's clock.
    ForeignClock,
    Known,
}

impl Default for LatencyHistograms {
    fn default() -> Self {
        let times = Histogram::new_with_bounds(1, MAX_RECORDED_NS, HISTOGRAM_DIGITS);
        let times = times.expect("the bounds are valid");
        Self {
            one_way: times.clone(),
            lateness: times.clone(),
            runner: times.clone(),
            sender: times.clone(),
            ttft: times.clone(),
            gaps: times.clone(),
            tpot: times,
        }
    }
}

impl LatencyHistograms {
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, other) in [
            (&mut self.one_way, &other.one_way),
            (&mut self.lateness, &other.lateness),
            (&mut self.runner, &other.runner),
            (&mut self.sender, &other.sender),
            (&mut self.ttft, &other.ttft),
            (&mut self.gaps, &other.gaps),
            (&mut self.tpot, &other.tpot),
        ] {
            sum.add(other).expect("all histograms have the same bounds");
        }
    }

    fn record_timestamps(&mut self, stamp: TokenTimestamps, received_ns: u64) {
        let TokenTimestamps { due_ns, emitted_ns } = stamp;
        let since = |ns| received_ns.saturating_sub(ns);
        self.one_way.saturating_record(since(emitted_ns));
        if let Some(due_ns) = due_ns {
            let runner_ns = emitted_ns.saturating_sub(due_ns);
            self.lateness.saturating_record(since(due_ns));
            self.runner.saturating_record(runner_ns);
        }
    }
}

impl LoadStats {
    /// Creates empty figures of a load that starts now.
    pub(crate) fn new() -> Self {
        Self {
            started_ns: monotonic_ns(),
            started_cpu: thread_cpu_time(),
            ..Self::default()
        }
    }

    pub(crate) fn from_fault(fault: &Fault) -> Self {
        let mut stats = Self::new();
        stats.record_fault(fault.to_string());
        stats
    }

    /// Records that a stream starts now, and was due to start at `due_ns`.
    pub(crate) fn record_start(&mut self, due_ns: u64) {
        let late = monotonic_ns().saturating_sub(due_ns);
        self.times.sender.saturating_record(late);
    }

    pub(crate) fn record_read(&mut self, bytes: usize) {
        self.reads += 1;
        self.bytes += u64::try_from(bytes).unwrap_or(0);
    }

    pub(crate) fn record_token_bytes(&mut self, bytes: usize) {
        self.token_bytes += u64::try_from(bytes).unwrap_or(0);
    }

    /// Records a request whose tokens have all arrived.
    pub(crate) fn record_request(&mut self, progress: &RequestTimer) {
        self.requests += 1;
        let intervals = u64::from(progress.count.saturating_sub(1));
        if let Some(tpot) = progress.streaming_ns().checked_div(intervals) {
            self.times.tpot.saturating_record(tpot);
        }
    }

    pub(crate) fn record_fault(&mut self, fault: String) {
        self.fault_count += 1;
        self.list_fault(fault);
    }

    pub(crate) fn add_faults(&mut self, other: &Self) {
        self.fault_count += other.fault_count;
        for fault in &other.faults {
            self.list_fault(fault.clone());
        }
    }

    fn list_fault(&mut self, fault: String) {
        if self.faults.len() < LISTED_FAULTS && !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    /// Records a fault if timestamps come from another clock. Call it only for a server on this machine.
    pub(crate) fn record_foreign_timestamps(&mut self) {
        if self.foreign_stamps > 0 {
            let count = self.foreign_stamps;
            self.record_fault(format!(
                "{count} timestamps come from another machine's clock"
            ));
        }
    }

    pub(crate) fn rates(&self) -> Rates {
        let (tokens, seconds) = (
            count_to_f64(self.tokens),
            count_to_f64(self.elapsed_ns) / 1e9,
        );
        Rates {
            tokens: self.tokens,
            tokens_per_second: tokens / seconds,
            requests_per_second: count_to_f64(self.requests) / seconds,
            tokens_per_read: tokens / count_to_f64(self.reads),
            bytes_per_token: count_to_f64(self.bytes) / tokens,
        }
    }

    /// Returns the availability of the timestamps. Call it only if they were requested.
    pub(crate) fn timestamp_status(&self) -> TimestampStatus {
        if self.foreign_stamps > 0 {
            TimestampStatus::ForeignClock
        } else if self.times.one_way.is_empty() {
            TimestampStatus::Absent
        } else {
            TimestampStatus::Known
        }
    }

    /// Records that the load ends now.
    pub(crate) fn record_end(&mut self) {
        self.elapsed_ns = self.last_token_ns.saturating_sub(self.started_ns);
        let wall = Duration::from_nanos(monotonic_ns().saturating_sub(self.started_ns));
        let cpu = thread_cpu_time().saturating_sub(self.started_cpu);
        self.load_share = cpu.div_duration_f64(wall);
    }
}

pub(crate) fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("processor time is not negative")
}

/// Progress of one request: number and times of the tokens that have arrived.
pub(crate) struct RequestTimer {
    due_ns: u64,
    first_ns: u64,
    last_ns: u64,
    every_gap: bool,
    /// Number of tokens that have arrived.
    pub(crate) count: u32,
}

impl RequestTimer {
    /// Creates the progress of a request that is due at `due_ns`. If `every_gap` is false, gaps are recorded only
    /// between tokens with timestamps.
    pub(crate) fn start(due_ns: u64, every_gap: bool) -> Self {
        Self {
            due_ns,
            first_ns: 0,
            last_ns: 0,
            every_gap,
            count: 0,
        }
    }

    /// Returns the time from the request to the last token.
    pub(crate) fn total_ns(&self) -> u64 {
        self.last_ns.saturating_sub(self.due_ns)
    }

    /// Returns the time from the first token to the last.
    pub(crate) fn streaming_ns(&self) -> u64 {
        self.last_ns.saturating_sub(self.first_ns)
    }

    pub(crate) fn record_token(
        &mut self,
        stats: &mut LoadStats,
        received_ns: u64,
        stamp: Option<TokenTimestamps>,
    ) {
        if self.count == 0 {
            let ttft = received_ns.saturating_sub(self.due_ns);
            stats.times.ttft.saturating_record(ttft);
            stats.started += 1;
            self.first_ns = received_ns;
        } else if self.every_gap || stamp.is_some() {
            let gap = received_ns.saturating_sub(self.last_ns);
            stats.times.gaps.saturating_record(gap);
        }
        if let Some(stamp) = stamp {
            // On this machine's clock, a token is emitted after its request was due and before it arrives.
            if (self.due_ns..=received_ns).contains(&stamp.emitted_ns) {
                stats.times.record_timestamps(stamp, received_ns);
            } else {
                stats.foreign_stamps += 1;
            }
        }
        self.last_ns = received_ns;
        self.count += 1;
        stats.tokens += 1;
        stats.last_token_ns = stats.last_token_ns.max(received_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;

    fn stamp(due_ns: Option<u64>, emitted_ns: u64) -> Option<TokenTimestamps> {
        Some(TokenTimestamps { due_ns, emitted_ns })
    }

    #[test]
    fn rounds_are_added_time_by_time() {
        let (mut sum, mut other) = (LatencyHistograms::default(), LatencyHistograms::default());
        sum.tpot.saturating_record(US);
        other.tpot.saturating_record(3 * US);
        other.ttft.saturating_record(2 * US);
        sum.add(&other);
        assert_eq!((sum.tpot.len(), sum.ttft.len(), sum.gaps.len()), (2, 1, 0));
    }

    #[test]
    fn the_times_of_a_request_are_as_they_are_defined() {
        let mut stats = LoadStats::new();
        let started_ns = stats.started_ns;
        let mut progress = RequestTimer::start(started_ns, true);
        for after_ns in [500, 600, 900, 1_100] {
            progress.record_token(&mut stats, started_ns + after_ns, None);
        }
        stats.record_request(&progress);
        stats.record_end();
        let times = &stats.times;
        assert_eq!((times.ttft.max(), times.tpot.max()), (500, 200));
        let gaps = &times.gaps;
        assert_eq!((gaps.min(), gaps.max(), gaps.len()), (100, 300, 3));
        assert_eq!((stats.elapsed_ns, stats.requests), (1_100, 1));
        assert_eq!(stats.timestamp_status(), TimestampStatus::Absent);
    }

    #[test]
    fn a_single_token_has_no_time_per_output_token() {
        let (mut stats, mut progress) = (LoadStats::new(), RequestTimer::start(0, false));
        progress.record_token(&mut stats, 5, None);
        stats.record_request(&progress);
        assert_eq!((stats.requests, stats.times.tpot.len()), (1, 0));
    }

    #[test]
    fn every_token_that_a_stall_delayed_is_late_by_its_own_due_time() {
        let (mut stats, mut progress) = (LoadStats::new(), RequestTimer::start(0, false));
        for due_ns in (100..=1_000).step_by(100) {
            progress.record_token(&mut stats, 1_050, stamp(Some(due_ns), 1_000));
        }
        let times = &stats.times;
        assert_eq!(times.lateness.count_between(450, 1_000), 6);
        assert_eq!((times.lateness.min(), times.lateness.max()), (50, 950));
        assert_eq!((times.one_way.min(), times.one_way.max()), (50, 50));
        assert_eq!(times.runner.max(), 900);
    }

    #[test]
    fn a_device_without_a_schedule_has_no_lateness() {
        let (mut stats, mut progress) = (LoadStats::new(), RequestTimer::start(0, false));
        progress.record_token(&mut stats, 10, stamp(None, 5));
        assert_eq!(stats.timestamp_status(), TimestampStatus::Known);
        assert!(stats.times.lateness.is_empty());
    }

    #[test]
    fn stamps_of_another_machines_clock_are_not_counted_as_times() {
        for emitted_ns in [9, 51] {
            let (mut stats, mut progress) = (LoadStats::new(), RequestTimer::start(10, false));
            progress.record_token(&mut stats, 50, stamp(None, emitted_ns));
            assert_eq!(stats.timestamp_status(), TimestampStatus::ForeignClock);
            assert!(stats.times.one_way.is_empty());
        }
    }
}
