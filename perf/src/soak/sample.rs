//! Samples of the server: memory, descriptors and threads as Linux counts them, and its own gauges.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::tally::Tally;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::metrics::Metrics;
use crate::process::Holdings;

/// The server's gauges, by their names in `src/telemetry.rs`.
const SEQUENCES: &str = "tokenway_sequences_running";
const QUEUE_DEPTH: &str = "tokenway_requests_queued";
const CONNECTIONS: &str = "tokenway_connections_open";
const IN_FLIGHT: &str = "tokenway_requests_in_flight";

/// Time limit of reading the gauges.
const GAUGES_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval of the samples while the server becomes idle.
const WAIT_INTERVAL: Duration = Duration::from_millis(50);

/// Resources of the server, and counts of its clients so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Since the start of the run.
    pub(super) seconds: f64,
    pub(super) rss_bytes: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
    /// Occupied slots.
    pub(super) sequences: u64,
    pub(super) queued: u64,
    /// Without the connection over which the gauges are read.
    pub(super) connections: u64,
    pub(super) in_flight: u64,
    pub(super) streams_done: u64,
    pub(super) faults: u64,
}

/// Sampler of one server.
pub(super) struct Sampler {
    pub(super) http: ServerUrl,
    pub(super) process: u32,
    pub(super) start: Instant,
    pub(super) tally: Rc<RefCell<Tally>>,
}

impl Sampler {
    pub(super) async fn sample(&self) -> Result<Sample, Fault> {
        let holdings = Holdings::of(self.process).map_err(Fault::Process)?;
        let gauges = timeout(GAUGES_TIMEOUT, Metrics::fetch(&self.http)).await;
        let timed_out = Err(Fault::TimedOut(GAUGES_TIMEOUT.as_secs()));
        let gauges = gauges.unwrap_or(timed_out)?;
        let gauge = |name: &str| {
            let sum = gauges.sum(name);
            sum.ok_or_else(|| Fault::Malformed(name.to_owned()))
        };
        let tally = self.tally.borrow();
        Ok(Sample {
            seconds: self.start.elapsed().as_secs_f64(),
            rss_bytes: holdings.rss_bytes,
            descriptors: holdings.descriptors,
            threads: holdings.threads,
            sequences: gauge(SEQUENCES)?,
            queued: gauge(QUEUE_DEPTH)?,
            connections: gauge(CONNECTIONS)?.saturating_sub(1),
            in_flight: gauge(IN_FLIGHT)?,
            streams_done: tally.streams,
            faults: tally.fault_count,
        })
    }

    /// Samples until the condition holds or the time is over. Returns the last sample.
    pub(super) async fn wait(
        &self,
        at_most: Duration,
        condition: impl Fn(&Sample) -> bool,
    ) -> Result<Sample, Fault> {
        let until = Instant::now() + at_most;
        loop {
            let sample = self.sample().await?;
            if condition(&sample) || Instant::now() >= until {
                return Ok(sample);
            }
            sleep(WAIT_INTERVAL).await;
        }
    }
}

impl Sample {
    /// Reports if the server serves no client.
    pub(super) fn is_idle(&self) -> bool {
        self.sequences + self.queued + self.connections + self.in_flight == 0
    }
}
