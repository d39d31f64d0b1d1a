//! What a load saw: how much came, how fast, and how late.

use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use tokenway::runner::monotonic_ns;

use super::Fault;
use crate::stamp::Stamp;

/// Times to three digits, up to a minute.
const HIGHEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// How many different faults are told; the others are only counted.
const TOLD_FAULTS: usize = 5;

/// What a load saw.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) tokens: u64,
    pub(crate) requests: u64,
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
    /// Bytes of the lines or messages of tokens alone, without heads and frames.
    pub(crate) token_bytes: u64,
    /// How many requests have had their first token.
    pub(crate) begun: u64,
    /// How many gRPC requests have had the head of their answer, which they have while they wait for a
    /// slot.
    pub(crate) answered: u64,
    /// From the beginning to the last token, in nanoseconds.
    pub(crate) elapsed_ns: u64,
    /// The share of one processor that the load itself took. Near 1 it may be what holds up the tokens.
    pub(crate) load_share: f64,
    pub(crate) times: Times,
    /// Tokens whose stamps are of another machine's clock, from which no times were taken.
    pub(crate) foreign_stamps: u64,
    pub(crate) fault_count: u32,
    /// The first of them that differ.
    pub(crate) faults: Vec<String>,
    began_ns: u64,
    began_cpu: Duration,
    last_token_ns: u64,
}

/// How late tokens were, and how far apart, in nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// From the device's emission to the read that brought the token.
    pub(crate) one_way: Histogram<u64>,
    /// From the time at which the token was due to the read that brought it.
    pub(crate) lateness: Histogram<u64>,
    /// From the time at which it was due to its emission: the device's own fault.
    pub(crate) runner: Histogram<u64>,
    /// From the time at which a stream was due to begin to that at which the load began it: the load's
    /// own fault.
    pub(crate) sender: Histogram<u64>,
    /// From the time at which a request was due to the read that brought its first token.
    pub(crate) ttft: Histogram<u64>,
    /// Between the reads that brought two tokens of a stream.
    pub(crate) gaps: Histogram<u64>,
    /// For each request, from its first token to its last, over one less than their number.
    pub(crate) tpot: Histogram<u64>,
}

impl Times {
    pub(crate) fn new() -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, HIGHEST_NS, DIGITS).expect("the bounds are valid");
        Self {
            one_way: histogram(),
            lateness: histogram(),
            runner: histogram(),
            sender: histogram(),
            ttft: histogram(),
            gaps: histogram(),
            tpot: histogram(),
        }
    }

    /// Adds the times of another round.
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.one_way, &other.one_way),
            (&mut self.lateness, &other.lateness),
            (&mut self.runner, &other.runner),
            (&mut self.sender, &other.sender),
            (&mut self.ttft, &other.ttft),
            (&mut self.gaps, &other.gaps),
            (&mut self.tpot, &other.tpot),
        ] {
            mine.add(theirs).expect("they have the same bounds");
        }
    }
}

impl Figures {
    /// Nothing so far, from now on.
    pub(super) fn new() -> Self {
        Self {
            tokens: 0,
            requests: 0,
            reads: 0,
            bytes: 0,
            token_bytes: 0,
            begun: 0,
            answered: 0,
            elapsed_ns: 0,
            load_share: 0.0,
            times: Times::new(),
            foreign_stamps: 0,
            fault_count: 0,
            faults: Vec::new(),
            began_ns: monotonic_ns(),
            began_cpu: thread_cpu(),
            last_token_ns: 0,
        }
    }

    /// What a load saw that could not begin.
    pub(crate) fn of_fault(fault: &Fault) -> Self {
        let mut figures = Self::new();
        figures.fault(fault.to_string());
        figures
    }

    /// A stream begins now that was due then.
    pub(super) fn sent(&mut self, due_ns: u64) {
        let late = monotonic_ns().saturating_sub(due_ns);
        self.times.sender.saturating_record(late);
    }

    pub(super) fn read(&mut self, bytes: usize) {
        self.reads += 1;
        self.bytes += u64::try_from(bytes).unwrap_or(0);
    }

    /// A token took so many bytes.
    pub(super) fn token_bytes(&mut self, bytes: usize) {
        self.token_bytes += u64::try_from(bytes).unwrap_or(0);
    }

    /// Takes a token's times.
    fn stamped(&mut self, stamp: Stamp, received_ns: u64) {
        let Stamp { due_ns, emitted_ns } = stamp;
        let times = &mut self.times;
        times
            .one_way
            .saturating_record(received_ns.saturating_sub(emitted_ns));
        if let Some(due_ns) = due_ns {
            times
                .lateness
                .saturating_record(received_ns.saturating_sub(due_ns));
            times
                .runner
                .saturating_record(emitted_ns.saturating_sub(due_ns));
        }
    }

    /// Takes a request all of whose tokens have come.
    pub(crate) fn finished(&mut self, progress: &Progress) {
        self.requests += 1;
        let intervals = u64::from(progress.next_index.saturating_sub(1));
        let streaming_ns = progress.last_ns.saturating_sub(progress.first_ns);
        if let Some(tpot) = streaming_ns.checked_div(intervals) {
            self.times.tpot.saturating_record(tpot);
        }
    }

    pub(crate) fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        self.tell(fault);
    }

    /// Adds what went wrong in another part of a run.
    pub(crate) fn add_faults(&mut self, other: &Self) {
        self.fault_count += other.fault_count;
        for fault in &other.faults {
            self.tell(fault.clone());
        }
    }

    fn tell(&mut self, fault: String) {
        if self.faults.len() < TOLD_FAULTS && !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    /// Where tokens are expected to be stamped by this machine, stamps of another are a fault.
    pub(super) fn fault_foreign_stamps(&mut self) {
        if self.foreign_stamps > 0 {
            let count = self.foreign_stamps;
            self.fault(format!("{count} stamps are not of this machine's clock"));
        }
    }

    /// It ends now.
    pub(super) fn end(&mut self) {
        self.elapsed_ns = self.last_token_ns.saturating_sub(self.began_ns);
        let wall = Duration::from_nanos(monotonic_ns().saturating_sub(self.began_ns));
        let cpu = thread_cpu().saturating_sub(self.began_cpu);
        self.load_share = cpu.div_duration_f64(wall);
    }
}

/// The processor time of the load, which is this thread.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("no thread has run for less than no time")
}

/// What one request has seen so far.
pub(crate) struct Progress {
    due_ns: u64,
    first_ns: u64,
    last_ns: u64,
    times_every_gap: bool,
    pub(crate) next_index: u32,
}

impl Progress {
    /// A request that is due at that time.
    pub(crate) fn begin(due_ns: u64) -> Self {
        Self {
            due_ns,
            first_ns: 0,
            last_ns: 0,
            times_every_gap: false,
            next_index: 0,
        }
    }

    /// Takes the gaps also between tokens that have no stamps.
    pub(crate) fn timing_every_gap(self) -> Self {
        Self {
            times_every_gap: true,
            ..self
        }
    }

    /// Takes the next token, which a read brought at that time.
    pub(crate) fn token(&mut self, figures: &mut Figures, received_ns: u64, stamp: Option<Stamp>) {
        if self.next_index == 0 {
            let ttft = received_ns.saturating_sub(self.due_ns);
            figures.times.ttft.saturating_record(ttft);
            figures.begun += 1;
            self.first_ns = received_ns;
        } else if self.times_every_gap || stamp.is_some() {
            let gap = received_ns.saturating_sub(self.last_ns);
            figures.times.gaps.saturating_record(gap);
        }
        if let Some(stamp) = stamp {
            // On one clock a token is emitted between when its request was due and its arrival.
            if (self.due_ns..=received_ns).contains(&stamp.emitted_ns) {
                figures.stamped(stamp, received_ns);
            } else {
                figures.foreign_stamps += 1;
            }
        }
        self.last_ns = received_ns;
        self.next_index += 1;
        figures.tokens += 1;
        figures.last_token_ns = figures.last_token_ns.max(received_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;

    /// Whether a value of a histogram is this one, to three digits.
    fn assert_near(value: u64, expected: u64) {
        assert!(
            value.abs_diff(expected) * 1_000 <= expected,
            "{value} {expected}"
        );
    }

    #[test]
    fn the_quantiles_of_a_known_series_are_those_of_the_nearest_rank() {
        let mut times = Times::new();
        // Not in order: a stride that has no divisor in common with the number of values.
        for place in 0..10_000 {
            let value = (place * 7_919 % 10_000 + 1) * US;
            times.one_way.saturating_record(value);
        }
        for (quantile, expected) in [
            (0.5, 5_000 * US),
            (0.9, 9_000 * US),
            (0.99, 9_900 * US),
            (0.999, 9_990 * US),
            (1.0, 10_000 * US),
        ] {
            assert_near(times.one_way.value_at_quantile(quantile), expected);
        }
        assert_near(times.one_way.min(), US);
        assert_eq!(times.one_way.len(), 10_000);
    }

    #[test]
    fn a_time_beyond_a_minute_counts_as_a_minute() {
        let mut times = Times::new();
        times.gaps.saturating_record(u64::MAX);
        assert!(times.gaps.max() >= HIGHEST_NS);
        assert_eq!(times.gaps.len(), 1);
    }

    #[test]
    fn rounds_are_added_time_by_time() {
        let (mut sum, mut other) = (Times::new(), Times::new());
        sum.tpot.saturating_record(US);
        other.tpot.saturating_record(3 * US);
        other.ttft.saturating_record(2 * US);
        sum.add(&other);
        assert_eq!((sum.tpot.len(), sum.ttft.len(), sum.gaps.len()), (2, 1, 0));
        assert_near(sum.tpot.max(), 3 * US);
    }

    #[test]
    fn the_times_of_a_request_are_as_they_are_defined() {
        let mut figures = Figures::new();
        let began_ns = figures.began_ns;
        let mut progress = Progress::begin(began_ns).timing_every_gap();
        for after_ns in [500, 600, 900, 1_100] {
            progress.token(&mut figures, began_ns + after_ns, None);
        }
        figures.finished(&progress);
        figures.end();
        let times = &figures.times;
        assert_eq!((times.ttft.max(), times.tpot.max()), (500, 200));
        assert_eq!(
            (times.gaps.min(), times.gaps.max(), times.gaps.len()),
            (100, 300, 3)
        );
        assert_eq!((figures.elapsed_ns, figures.requests), (1_100, 1));
        assert_eq!(times.one_way.len(), 0);
    }

    #[test]
    fn a_single_token_has_no_time_per_further_token() {
        let (mut figures, mut progress) = (Figures::new(), Progress::begin(0));
        progress.token(&mut figures, 5, None);
        figures.finished(&progress);
        assert_eq!((figures.requests, figures.times.tpot.len()), (1, 0));
    }

    #[test]
    fn every_token_that_a_stall_delayed_is_late_by_its_own_due_time() {
        let (mut figures, mut progress) = (Figures::new(), Progress::begin(0));
        for due_ns in (100..=1_000).step_by(100) {
            let (due_ns, emitted_ns) = (Some(due_ns), 1_000);
            progress.token(&mut figures, 1_050, Some(Stamp { due_ns, emitted_ns }));
        }
        let Times {
            lateness,
            runner,
            one_way,
            ..
        } = &figures.times;
        assert_eq!(lateness.count_between(450, 1_000), 6);
        assert_eq!((lateness.min(), lateness.max()), (50, 950));
        assert_eq!((runner.max(), one_way.min(), one_way.max()), (900, 50, 50));
    }

    #[test]
    fn stamps_of_another_machines_clock_are_no_times() {
        for emitted_ns in [9, 51] {
            let (mut figures, mut progress) = (Figures::new(), Progress::begin(10));
            progress.token(
                &mut figures,
                50,
                Some(Stamp {
                    due_ns: None,
                    emitted_ns,
                }),
            );
            assert_eq!(
                (figures.foreign_stamps, figures.times.one_way.len()),
                (1, 0)
            );
        }
    }
}
