//! Counts of all streams, and of the faults that were injected.

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

/// Faults that are listed; the others are only counted.
const LISTED_FAULTS: usize = 10;

const MIB: u64 = 1024 * 1024;

/// Longest gap that the histogram tells from longer ones: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Shared counts.
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
    /// Times between two tokens of a stream, in nanoseconds.
    gaps: Histogram<u64>,
    memory: Option<MemoryRange>,
    metrics: Metrics,
}

/// Range of the memory over all samples, in bytes.
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
    pub(super) fn token(&self, gap: Duration) {
        let mut counts = self.0.borrow_mut();
        counts.tokens += 1;
        let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
        counts.gaps.saturating_record(gap);
    }

    /// Counts a stream that has ended.
    pub(super) fn ended(&self, stream: Result<Texts, Fault>) {
        self.0.borrow_mut().streams += 1;
        if let Err(fault) = stream {
            self.fault(fault.to_string());
        }
    }

    /// Counts a fault that is not of a single stream.
    pub(super) fn fault(&self, fault: String) {
        self.0.borrow_mut().faults.push(fault);
    }

    /// Counts a worker that was killed or stopped.
    pub(super) fn signalled(&self, signal: Signal) {
        let mut counts = self.0.borrow_mut();
        if signal == Signal::STOP {
            counts.stops += 1;
        } else {
            counts.kills += 1;
        }
    }

    pub(super) fn sample_memory(&self, server: &Server) {
        let Memory { engine, workers } = server.memory();
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

    /// Keeps the server's metrics for the report.
    pub(super) fn metrics(&self, metrics: Metrics) {
        self.0.borrow_mut().metrics = metrics;
    }

    /// Reports if every stream repeated its undisturbed completion.
    pub(super) fn is_good(&self) -> bool {
        self.0.borrow().faults.is_empty()
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let counts = self.0.borrow();
        let Counts { seed, workers, .. } = *counts;
        let Counts { kills, stops, .. } = *counts;
        let Counts {
            streams, tokens, ..
        } = *counts;
        let count = |name| counts.metrics.sum(name).unwrap_or(0);
        let resumptions = count("tokenway_resumptions_total");
        let replayed = count("tokenway_tokens_replayed_total");
        let Percentiles { p50, p99, max, .. } = Percentiles::of(&counts.gaps);
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
