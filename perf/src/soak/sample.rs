//! Samples of the server: its memory, descriptors and threads from Linux, and its own gauges.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::tally::Tally;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::metrics::Metrics;
use crate::process::HeldResources;

/// Names of the server's gauges, as in `src/telemetry.rs`.
const SEQUENCES_METRIC: &str = "tokenway_sequences_running";
const QUEUE_DEPTH_METRIC: &str = "tokenway_requests_queued";
const CONNECTIONS_METRIC: &str = "tokenway_connections_open";
const IN_FLIGHT_METRIC: &str = "tokenway_requests_in_flight";
const PREFIX_CACHE_METRIC: &str = "tokenway_prefix_cache_bytes";
/// Time limit for reading the gauges.
const GAUGES_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two samples while the run waits for a condition.
const WAIT_INTERVAL: Duration = Duration::from_millis(50);

/// Resources that the server holds, and counts of the clients so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Time since the start of the run, in seconds.
    pub(super) seconds: f64,
    pub(super) rss_bytes: u64,
    /// Memory of the sequences that had to leave their slot.
    pub(super) prefix_cache_bytes: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
    /// Number of occupied slots.
    pub(super) sequences: u64,
    pub(super) queued: u64,
    /// Number of connections, without the one over which the gauges are read.
    pub(super) connections: u64,
    pub(super) in_flight: u64,
    pub(super) streams_done: u64,
    pub(super) faults: u64,
}

pub(super) struct Sampler {
    pub(super) http: ServerUrl,
    pub(super) process: u32,
    pub(super) start: Instant,
    pub(super) tally: Rc<RefCell<Tally>>,
}

impl Sampler {
    pub(super) async fn sample(&self) -> Result<Sample, Fault> {
        let holdings = HeldResources::of_process(self.process).map_err(Fault::Process)?;
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
            prefix_cache_bytes: gauge(PREFIX_CACHE_METRIC)?,
            descriptors: holdings.descriptors,
            threads: holdings.threads,
            sequences: gauge(SEQUENCES_METRIC)?,
            queued: gauge(QUEUE_DEPTH_METRIC)?,
            connections: gauge(CONNECTIONS_METRIC)?.saturating_sub(1),
            in_flight: gauge(IN_FLIGHT_METRIC)?,
            streams_done: tally.streams,
            faults: tally.fault_count,
        })
    }

    /// Takes samples until the condition holds or the time is over. Returns the last sample.
    pub(super) async fn wait_for_sample(
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
    pub(super) fn is_idle(&self) -> bool {
        self.sequences + self.queued + self.connections + self.in_flight == 0
    }
}
