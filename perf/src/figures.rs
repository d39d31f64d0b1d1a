//! Counts and times of a load: how many tokens arrived, how fast, and how late.

use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};
use tokenway::runner::monotonic_ns;

use crate::fault::Fault;
use crate::stamp::Stamp;
use crate::statistics::count;

/// Longest time that a histogram tells from longer ones, and its precision.
const HIGHEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// Distinct faults that are listed; the others are only counted.
const LISTED_FAULTS: usize = 5;

/// Counts and times of one load.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) tokens: u64,
    /// Requests whose tokens all arrived.
    pub(crate) requests: u64,
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
    /// Bytes of the tokens' lines or messages, without heads and frames.
    pub(crate) token_bytes: u64,
    /// Requests whose first token arrived.
    pub(crate) started: u64,
    /// gRPC requests whose response headers arrived, which the server sends before a slot is free.
    pub(crate) answered: u64,
    /// From the start of the load to the last token.
    pub(crate) elapsed_ns: u64,
    /// Share of one processor that the load took. Near 1 the load itself may be the bottleneck.
    pub(crate) load_share: f64,
    pub(crate) times: Times,
    /// Tokens stamped by another machine's clock; their times are not counted.
    pub(crate) foreign_stamps: u64,
    pub(crate) fault_count: u32,
    /// First distinct faults.
    pub(crate) faults: Vec<String>,
    started_ns: u64,
    started_cpu: Duration,
    last_token_ns: u64,
}

/// Rates of one load.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Rates {
    pub(crate) tokens: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) requests_per_second: f64,
    pub(crate) tokens_per_read: f64,
    pub(crate) bytes_per_token: f64,
}

/// Histograms of times in nanoseconds. In JSON each is a list of times with their numbers of occurrences.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Times {
    /// From the device's emission of a token to the read that returned it.
    #[serde(serialize_with = "pairs")]
    pub(crate) one_way: Histogram<u64>,
    /// From the time at which a token was due to the read that returned it.
    #[serde(rename = "schedule_lateness", serialize_with = "pairs")]
    pub(crate) lateness: Histogram<u64>,
    /// From the time at which a token was due to its emission, which is the device's own delay.
    #[serde(rename = "runner_lateness", serialize_with = "pairs")]
    pub(crate) runner: Histogram<u64>,
    /// From the time at which a stream was due to start to its start, which is the load's own delay.
    #[serde(rename = "sender_lateness", serialize_with = "pairs")]
    pub(crate) sender: Histogram<u64>,
    /// From the time at which a request was due to the read that returned its first token.
    #[serde(serialize_with = "pairs")]
    pub(crate) ttft: Histogram<u64>,
    /// Between the reads that returned two consecutive tokens of a stream.
    #[serde(rename = "inter_token", serialize_with = "pairs")]
    pub(crate) gaps: Histogram<u64>,
    /// For each request: (last token − first token) / (tokens − 1).
    #[serde(rename = "time_per_output_token", serialize_with = "pairs")]
    pub(crate) tpot: Histogram<u64>,
}

fn pairs<S: Serializer>(times: &Histogram<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    let recorded = times.iter_recorded();
    serializer
        .collect_seq(recorded.map(|value| (value.value_iterated_to(), value.count_at_value())))
}

/// Availability of a server's stamps, without which one-way latency is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stamps {
    #[serde(rename = "not_asked")]
    NotRequested,
    /// Requested, but the server sends none.
    Absent,
    /// Taken from another machine's clock.
    ForeignClock,
    Known,
}

impl Default for Times {
    fn default() -> Self {
        let times = Histogram::new_with_bounds(1, HIGHEST_NS, DIGITS);
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

impl Times {
    /// Adds the times of another round.
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

    fn stamped(&mut self, stamp: Stamp, received_ns: u64) {
        let Stamp { due_ns, emitted_ns } = stamp;
        let since = |ns| received_ns.saturating_sub(ns);
        self.one_way.saturating_record(since(emitted_ns));
        if let Some(due_ns) = due_ns {
            let runner_ns = emitted_ns.saturating_sub(due_ns);
            self.lateness.saturating_record(since(due_ns));
            self.runner.saturating_record(runner_ns);
        }
    }
}

impl Figures {
    /// Empty figures of a load that starts now.
    pub(crate) fn new() -> Self {
        Self {
            started_ns: monotonic_ns(),
            started_cpu: thread_cpu(),
            ..Self::default()
        }
    }

    /// Figures of a load that could not start.
    pub(crate) fn of_fault(fault: &Fault) -> Self {
        let mut figures = Self::new();
        figures.fault(fault.to_string());
        figures
    }

    /// Records that a stream starts now that was due at `due_ns`.
    pub(crate) fn sent(&mut self, due_ns: u64) {
        let late = monotonic_ns().saturating_sub(due_ns);
        self.times.sender.saturating_record(late);
    }

    pub(crate) fn read(&mut self, bytes: usize) {
        self.reads += 1;
        self.bytes += u64::try_from(bytes).unwrap_or(0);
    }

    pub(crate) fn token_bytes(&mut self, bytes: usize) {
        self.token_bytes += u64::try_from(bytes).unwrap_or(0);
    }

    /// Records a request whose tokens have all arrived.
    pub(crate) fn finished(&mut self, progress: &Progress) {
        self.requests += 1;
        let intervals = u64::from(progress.count.saturating_sub(1));
        if let Some(tpot) = progress.streaming_ns().checked_div(intervals) {
            self.times.tpot.saturating_record(tpot);
        }
    }

    pub(crate) fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        self.list(fault);
    }

    /// Adds the faults of another part of the run.
    pub(crate) fn add_faults(&mut self, other: &Self) {
        self.fault_count += other.fault_count;
        for fault in &other.faults {
            self.list(fault.clone());
        }
    }

    fn list(&mut self, fault: String) {
        if self.faults.len() < LISTED_FAULTS && !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    /// Adds foreign stamps to the faults, for a server that runs on this machine.
    pub(crate) fn fault_foreign_stamps(&mut self) {
        if self.foreign_stamps > 0 {
            let count = self.foreign_stamps;
            self.fault(format!("{count} stamps are not of this machine's clock"));
        }
    }

    pub(crate) fn rates(&self) -> Rates {
        let (tokens, seconds) = (count(self.tokens), count(self.elapsed_ns) / 1e9);
        Rates {
            tokens: self.tokens,
            tokens_per_second: tokens / seconds,
            requests_per_second: count(self.requests) / seconds,
            tokens_per_read: tokens / count(self.reads),
            bytes_per_token: count(self.bytes) / tokens,
        }
    }

    /// Availability of stamps, if they were requested.
    pub(crate) fn stamps(&self) -> Stamps {
        if self.foreign_stamps > 0 {
            Stamps::ForeignClock
        } else if self.times.one_way.is_empty() {
            Stamps::Absent
        } else {
            Stamps::Known
        }
    }

    /// Ends the load now.
    pub(crate) fn end(&mut self) {
        self.elapsed_ns = self.last_token_ns.saturating_sub(self.started_ns);
        let wall = Duration::from_nanos(monotonic_ns().saturating_sub(self.started_ns));
        let cpu = thread_cpu().saturating_sub(self.started_cpu);
        self.load_share = cpu.div_duration_f64(wall);
    }
}

/// Processor time of the current thread, on which the whole load runs.
pub(crate) fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("processor time is not negative")
}

/// Progress of one request.
pub(crate) struct Progress {
    due_ns: u64,
    first_ns: u64,
    last_ns: u64,
    every_gap: bool,
    /// Tokens that have arrived.
    pub(crate) count: u32,
}

impl Progress {
    /// Progress of a request that is due at `due_ns`. Gaps between tokens without stamps are recorded only
    /// with `every_gap`.
    pub(crate) fn start(due_ns: u64, every_gap: bool) -> Self {
        Self {
            due_ns,
            first_ns: 0,
            last_ns: 0,
            every_gap,
            count: 0,
        }
    }

    /// Time from the request to the last token.
    pub(crate) fn total_ns(&self) -> u64 {
        self.last_ns.saturating_sub(self.due_ns)
    }

    /// Time from the first token to the last.
    pub(crate) fn streaming_ns(&self) -> u64 {
        self.last_ns.saturating_sub(self.first_ns)
    }

    /// Records the next token, which a read returned at `received_ns`.
    pub(crate) fn token(&mut self, figures: &mut Figures, received_ns: u64, stamp: Option<Stamp>) {
        if self.count == 0 {
            let ttft = received_ns.saturating_sub(self.due_ns);
            figures.times.ttft.saturating_record(ttft);
            figures.started += 1;
            self.first_ns = received_ns;
        } else if self.every_gap || stamp.is_some() {
            let gap = received_ns.saturating_sub(self.last_ns);
            figures.times.gaps.saturating_record(gap);
        }
        if let Some(stamp) = stamp {
            // On one clock a token is emitted after its request was due and before it arrives.
            if (self.due_ns..=received_ns).contains(&stamp.emitted_ns) {
                figures.times.stamped(stamp, received_ns);
            } else {
                figures.foreign_stamps += 1;
            }
        }
        self.last_ns = received_ns;
        self.count += 1;
        figures.tokens += 1;
        figures.last_token_ns = figures.last_token_ns.max(received_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;

    fn stamp(due_ns: Option<u64>, emitted_ns: u64) -> Option<Stamp> {
        Some(Stamp { due_ns, emitted_ns })
    }

    #[test]
    fn rounds_are_added_time_by_time() {
        let (mut sum, mut other) = (Times::default(), Times::default());
        sum.tpot.saturating_record(US);
        other.tpot.saturating_record(3 * US);
        other.ttft.saturating_record(2 * US);
        sum.add(&other);
        assert_eq!((sum.tpot.len(), sum.ttft.len(), sum.gaps.len()), (2, 1, 0));
    }

    #[test]
    fn the_times_of_a_request_are_as_they_are_defined() {
        let mut figures = Figures::new();
        let started_ns = figures.started_ns;
        let mut progress = Progress::start(started_ns, true);
        for after_ns in [500, 600, 900, 1_100] {
            progress.token(&mut figures, started_ns + after_ns, None);
        }
        figures.finished(&progress);
        figures.end();
        let times = &figures.times;
        assert_eq!((times.ttft.max(), times.tpot.max()), (500, 200));
        let gaps = &times.gaps;
        assert_eq!((gaps.min(), gaps.max(), gaps.len()), (100, 300, 3));
        assert_eq!((figures.elapsed_ns, figures.requests), (1_100, 1));
        assert_eq!(figures.stamps(), Stamps::Absent);
    }

    #[test]
    fn a_single_token_has_no_time_per_output_token() {
        let (mut figures, mut progress) = (Figures::new(), Progress::start(0, false));
        progress.token(&mut figures, 5, None);
        figures.finished(&progress);
        assert_eq!((figures.requests, figures.times.tpot.len()), (1, 0));
    }

    #[test]
    fn every_token_that_a_stall_delayed_is_late_by_its_own_due_time() {
        let (mut figures, mut progress) = (Figures::new(), Progress::start(0, false));
        for due_ns in (100..=1_000).step_by(100) {
            progress.token(&mut figures, 1_050, stamp(Some(due_ns), 1_000));
        }
        let times = &figures.times;
        assert_eq!(times.lateness.count_between(450, 1_000), 6);
        assert_eq!((times.lateness.min(), times.lateness.max()), (50, 950));
        assert_eq!((times.one_way.min(), times.one_way.max()), (50, 50));
        assert_eq!(times.runner.max(), 900);
    }

    #[test]
    fn a_device_without_a_schedule_has_no_lateness() {
        let (mut figures, mut progress) = (Figures::new(), Progress::start(0, false));
        progress.token(&mut figures, 10, stamp(None, 5));
        assert_eq!(figures.stamps(), Stamps::Known);
        assert!(figures.times.lateness.is_empty());
    }

    #[test]
    fn stamps_of_another_machines_clock_are_not_counted_as_times() {
        for emitted_ns in [9, 51] {
            let (mut figures, mut progress) = (Figures::new(), Progress::start(10, false));
            progress.token(&mut figures, 50, stamp(None, emitted_ns));
            assert_eq!(figures.stamps(), Stamps::ForeignClock);
            assert!(figures.times.one_way.is_empty());
        }
    }
}
