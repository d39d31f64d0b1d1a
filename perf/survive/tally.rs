//! What came of all streams, and what was done to the workers.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::server::{Server, metric};
use super::stream::{Expected, Fault};

/// How many faults are told one by one.
const TOLD: usize = 10;

const MIB: u64 = 1024 * 1024;

/// The longest gap that is told from longer ones, in microseconds: an hour.
const LONGEST_US: u64 = 3_600_000_000;

/// Counts. Clones count into the same.
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
    /// The times between two tokens of a stream, in microseconds.
    gaps: Histogram<u64>,
    /// The least and the most memory of the engine, in bytes, and the most of its workers together.
    engine: Option<(u64, u64)>,
    of_workers: u64,
    metrics: String,
}

impl Tally {
    /// Nothing yet, on so many workers.
    pub(super) fn new(workers: u16, seed: u64) -> Self {
        let gaps = Histogram::new_with_bounds(1, LONGEST_US, 3);
        let gaps = gaps.expect("three digits of an hour are allowed");
        Self(Rc::new(RefCell::new(Counts {
            seed,
            workers,
            streams: 0,
            tokens: 0,
            kills: 0,
            stops: 0,
            faults: Vec::new(),
            gaps,
            engine: None,
            of_workers: 0,
            metrics: String::new(),
        })))
    }

    /// A token came so long after the one before it.
    pub(super) fn token(&self, gap: Duration) {
        let mut counts = self.0.borrow_mut();
        counts.tokens += 1;
        let gap = u64::try_from(gap.as_micros()).unwrap_or(u64::MAX);
        counts.gaps.saturating_record(gap);
    }

    /// A stream has ended.
    pub(super) fn ended(&self, stream: Result<Expected, Fault>) {
        let mut counts = self.0.borrow_mut();
        counts.streams += 1;
        counts
            .faults
            .extend(stream.err().map(|fault| fault.to_string()));
    }

    /// Streams do not end.
    pub(super) fn hangs(&self) {
        self.0.borrow_mut().faults.push("streams hang".to_owned());
    }

    pub(super) fn fault(&self, is_stop: bool) {
        let mut counts = self.0.borrow_mut();
        if is_stop {
            counts.stops += 1;
        } else {
            counts.kills += 1;
        }
    }

    /// Looks at the server's memory.
    pub(super) fn look(&self, server: &Server) {
        let (engine, workers) = server.memory();
        let mut counts = self.0.borrow_mut();
        let (least, most) = counts.engine.unwrap_or((engine, engine));
        counts.engine = Some((least.min(engine), most.max(engine)));
        counts.of_workers = counts.of_workers.max(workers);
    }

    pub(super) fn metrics(&self, text: &str) {
        text.clone_into(&mut self.0.borrow_mut().metrics);
    }

    /// Whether every stream was what it had to be.
    pub(super) fn is_good(&self) -> bool {
        self.0.borrow().faults.is_empty()
    }

    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let counts = self.0.borrow();
        let count = |name| metric(&counts.metrics, name).unwrap_or(0.0);
        let milliseconds =
            |microseconds: u64| Duration::from_micros(microseconds).as_secs_f64() * 1e3;
        let (least, most) = counts.engine.unwrap_or_default();
        writeln!(out, "seed             {}", counts.seed)?;
        writeln!(
            out,
            "workers          {} processes; killed (SIGKILL) {} times, stopped (SIGSTOP) {} times",
            counts.workers, counts.kills, counts.stops
        )?;
        writeln!(
            out,
            "streams          {} with {} tokens; {} faults",
            counts.streams,
            counts.tokens,
            counts.faults.len()
        )?;
        writeln!(
            out,
            "resumptions      {}, with {} tokens replayed",
            count("tokenway_resumptions_total"),
            count("tokenway_tokens_replayed_total")
        )?;
        writeln!(
            out,
            "gaps in streams  p50 {:.1} ms, p99 {:.1} ms, longest {:.0} ms",
            milliseconds(counts.gaps.value_at_quantile(0.5)),
            milliseconds(counts.gaps.value_at_quantile(0.99)),
            milliseconds(counts.gaps.max())
        )?;
        writeln!(
            out,
            "memory           engine {} to {} MiB, workers together up to {} MiB",
            least / MIB,
            most / MIB,
            counts.of_workers / MIB
        )?;
        for fault in counts.faults.iter().take(TOLD) {
            writeln!(out, "FAULT            {fault}")?;
        }
        Ok(())
    }
}
