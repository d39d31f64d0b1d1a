//! Counts the streams, their tokens and the injected faults.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;
use std::time::Duration;

use hdrhistogram::Histogram;
use rustix::process::Signal;

use super::server::{Memory, Server};
use super::stream::Texts;
use crate::fault::Fault;
use crate::metrics::Metrics;
use crate::statistics::Percentiles;

/// Number of faults that are listed. Further faults are only counted.
const LISTED_FAULTS: usize = 10;
const MIB: u64 = 1024 * 1024;
/// Longest gap that the histogram records exactly: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Counts that all streams share.
#[derive(Clone)]
pub(super) struct Tally(Rc<RefCell<Counts>>);

struct Counts {
    seed: u64,
    workers: u16,
    streams: u64,
    tokens: u64,
    kills: u64,
    stops: u64,
    faults: Vec<String>,
    /// Histogram of the times between two tokens of a stream, in nanoseconds.
    gaps: Histogram<u64>,
    memory: Option<MemoryRange>,
    metrics: Metrics,
}

/// Lowest and highest memory over all samples, in bytes.
struct MemoryRange {
    least_engine: u64,
    most_engine: u64,
    most_workers: u64,
}

impl Tally {
    pub(super) fn new(workers: u16, seed: u64) -> Self {
        let gaps = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Self(Rc::new(RefCell::new(Counts {
            seed,
            workers,
            streams: 0,
            tokens: 0,
            kills: 0,
            stops: 0,
            faults: Vec::new(),
            gaps: gaps.expect("the bounds are valid"),
            memory: None,
            metrics: Metrics::default(),
        })))
    }

    /// Counts a token that arrived this long after the one before it.
    pub(super) fn record_token(&self, gap: Duration) {
        let mut counts = self.0.borrow_mut();
        counts.tokens += 1;
        let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
        counts.gaps.saturating_record(gap);
    }

    pub(super) fn record_end(&self, stream: Result<Texts, Fault>) {
        self.0.borrow_mut().streams += 1;
        if let Err(fault) = stream {
            self.record_fault(fault.to_string());
        }
    }

    /// Counts a fault that does not belong to a single stream.
    pub(super) fn record_fault(&self, fault: String) {
        self.0.borrow_mut().faults.push(fault);
    }

    pub(super) fn record_signal(&self, signal: Signal) {
        let mut counts = self.0.borrow_mut();
        if signal == Signal::STOP {
            counts.stops += 1;
        } else {
            counts.kills += 1;
        }
    }

    pub(super) fn sample_memory(&self, server: &Server) {
        let Memory { engine, workers } = server.measure_memory();
        let memory = &mut self.0.borrow_mut().memory;
        let range = memory.get_or_insert(MemoryRange {
            least_engine: engine,
            most_engine: engine,
            most_workers: workers,
        });
        range.least_engine = range.least_engine.min(engine);
        range.most_engine = range.most_engine.max(engine);
        range.most_workers = range.most_workers.max(workers);
    }

    /// Sets the server's metrics, which the report shows.
    pub(super) fn set_metrics(&self, metrics: Metrics) {
        self.0.borrow_mut().metrics = metrics;
    }

    /// Returns true if every stream repeated its undisturbed completion.
    pub(super) fn has_passed(&self) -> bool {
        self.0.borrow().faults.is_empty()
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let counts = self.0.borrow();
        let Counts { seed, workers, .. } = *counts;
        let Counts { kills, stops, .. } = *counts;
        let (streams, tokens) = (counts.streams, counts.tokens);
        let count = |name| counts.metrics.sum(name).unwrap_or(0);
        let resumptions = count("tokenway_resumptions_total");
        let replayed = count("tokenway_tokens_replayed_total");
        let Percentiles { p50, p99, max, .. } = Percentiles::from_histogram(&counts.gaps);
        let (p50, p99, max) = (p50 / 1e3, p99 / 1e3, max / 1e3);
        let faults = counts.faults.len();
        writeln!(
            out,
            "seed             {seed}\n\
             workers          {workers} processes; killed (SIGKILL) {kills} times, stopped (SIGSTOP) {stops} \
             times\n\
             streams          {streams} with {tokens} tokens; {faults} faults\n\
             resumptions      {resumptions}, with {replayed} tokens replayed\n\
             gaps in streams  p50 {p50:.1} ms, p99 {p99:.1} ms, longest {max:.0} ms"
        )?;
        if let Some(memory) = &counts.memory {
            writeln!(
                out,
                "memory           engine {} to {} MiB, workers together up to {} MiB",
                memory.least_engine / MIB,
                memory.most_engine / MIB,
                memory.most_workers / MIB
            )?;
        }
        for fault in counts.faults.iter().take(LISTED_FAULTS) {
            writeln!(out, "FAULT            {fault}")?;
        }
        Ok(())
    }
}
