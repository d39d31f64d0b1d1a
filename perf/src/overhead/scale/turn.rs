//! Measures one path with thousands of streams. The turn starts new servers, so that the growth of their memory is due
//! to the streams.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{SETTLE_TIME, Scale};
use crate::load::{ConnectionPlan, LoadGenerator};
use crate::load_stats::LoadStats;
use crate::overhead::fleet::Fleet;
use crate::overhead::path::MeasuredPath;
use crate::overhead::results::{Round, TurnResult};
use crate::overhead::scenario::{RunSize, Scenario};
use crate::process::ResourceUsage;
use crate::statistics::count_to_f64;

/// Time that streams may need to end, in addition to their planned duration.
const END_GRACE: Duration = Duration::from_secs(30);

/// Runs one turn of `path`. Only the window in which all streams are open is measured.
pub(in crate::overhead) async fn run_turn(
    scale: Scale,
    path: MeasuredPath,
    size: RunSize,
) -> anyhow::Result<TurnResult> {
    let fleet = Fleet::start(&BTreeSet::from([path]), scale.server_options()).await?;
    let turn = ScaleTurn {
        scale,
        path,
        size,
        fleet,
    };
    turn.run().await
}

struct ScaleTurn {
    scale: Scale,
    path: MeasuredPath,
    size: RunSize,
    fleet: Fleet,
}

/// Figures of a turn, before and in the measured window.
struct TurnFigures {
    /// Figures from the start of the load to the start of the window.
    early: LoadStats,
    /// Figures of the window.
    steady: LoadStats,
    /// CPU time and memory of the servers at the start and at the end of the window.
    usage: Option<(ResourceUsage, ResourceUsage)>,
}

impl ScaleTurn {
    async fn run(&self) -> anyhow::Result<TurnResult> {
        let target = self.fleet.target(self.path);
        let warm_up = self.scale.warm_up();
        let generator =
            LoadGenerator::open(target, ConnectionPlan::for_streams(warm_up.streams)).await?;
        let mut faults = generator.run(&warm_up).await.faults;
        drop(generator);
        let unconnected = self.fleet.usage(self.path)?;
        let generator = LoadGenerator::open(target, self.scale.connection_plan()).await?;
        let connected = self.fleet.usage(self.path)?;
        let load = self.scale.load(self.size);
        let running = timeout(self.time_limit(), generator.run(&load));
        let (observed, ended) = tokio::join!(self.measure_window(&generator), running);
        let mut observed = observed?;
        observed.steady.record_foreign_timestamps();
        observed.early.add_faults(&observed.steady);
        match &ended {
            Ok(rest) => observed.early.add_faults(rest),
            // Queued requests would wait forever. They end when the generator is dropped.
            Err(_) if self.scale.is_queue() => {}
            Err(_) => {
                let fault = "streams did not end within their time limit".to_owned();
                observed.early.record_fault(fault);
            }
        }
        self.check_open(&mut observed);
        let before = if self.scale.is_queue() {
            connected
        } else {
            unconnected
        };
        faults.extend(observed.early.faults.clone());
        Ok(TurnResult {
            round: self.to_round(&observed, before),
            times: observed.steady.times,
            faults,
        })
    }

    fn time_limit(&self) -> Duration {
        let measured =
            self.scale.settled_after() + self.scale.window_length(self.size) + SETTLE_TIME;
        if self.scale.is_queue() {
            measured
        } else {
            measured + self.scale.ramp_time() + END_GRACE
        }
    }

    async fn measure_window(&self, generator: &LoadGenerator) -> anyhow::Result<TurnFigures> {
        sleep(self.scale.settled_after()).await;
        let early = generator.take_stats();
        let first = self.fleet.usage(self.path)?;
        sleep(self.scale.window_length(self.size)).await;
        let second = self.fleet.usage(self.path)?;
        Ok(TurnFigures {
            early,
            steady: generator.take_stats(),
            usage: first.zip(second),
        })
    }

    /// Records a fault unless all streams were open during the whole window.
    fn check_open(&self, observed: &mut TurnFigures) {
        let (early, steady) = (&observed.early, &observed.steady);
        let open = if self.scale.is_queue() {
            early.answered + steady.answered
        } else {
            let ended = early.requests + steady.requests;
            early.started.saturating_sub(ended)
        };
        let streams = self.scale.streams();
        if open != u64::from(streams) {
            let fault =
                format!("only {open} of {streams} streams were open during the whole window");
            observed.early.record_fault(fault);
        }
    }

    fn to_round(&self, observed: &TurnFigures, before: Option<ResourceUsage>) -> Round {
        let scenario = Scenario::Scale(self.scale);
        let usage = observed.usage;
        let cpu = usage.map(|(first, second)| scenario.counted_cpu(first, second));
        let rss_bytes = usage.map(|(_, second)| second.rss_bytes);
        let growth = |(after, before): (u64, ResourceUsage)| {
            count_to_f64(after) - count_to_f64(before.rss_bytes)
        };
        let grown = rss_bytes.zip(before).map(growth);
        Round {
            rss_per_stream: grown.map(|bytes| bytes / f64::from(self.scale.size)),
            faults: observed.early.fault_count,
            ..Round::from_stats(&observed.steady, cpu, rss_bytes)
        }
    }
}
