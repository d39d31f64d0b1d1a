//! One path's turn with thousands of streams, on servers of its own that have served nothing before: the
//! growth of their memory is due to the streams.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{SETTLE, Scale};
use crate::figures::Figures;
use crate::load::{Session, Sockets};
use crate::overhead::fleet::Fleet;
use crate::overhead::path::MeasuredPath;
use crate::overhead::results::{Round, TurnResult};
use crate::overhead::scenario::{Scenario, Size};
use crate::process::Usage;
use crate::statistics::count;

/// Time by which streams may end late.
const GRACE: Duration = Duration::from_secs(30);

/// Takes the turn. Only a window counts, in which all streams are open.
pub(in crate::overhead) async fn turn(
    scale: Scale,
    path: MeasuredPath,
    size: Size,
) -> anyhow::Result<TurnResult> {
    let fleet = Fleet::start(&BTreeSet::from([path]), scale.servers()).await?;
    let turn = Turn {
        scale,
        path,
        size,
        fleet,
    };
    turn.take().await
}

struct Turn {
    scale: Scale,
    path: MeasuredPath,
    size: Size,
    fleet: Fleet,
}

/// Figures of a turn.
struct Observed {
    /// Up to the window.
    early: Figures,
    /// In the window.
    steady: Figures,
    /// Usage of the servers at the window's start and end.
    usage: Option<(Usage, Usage)>,
}

impl Turn {
    async fn take(&self) -> anyhow::Result<TurnResult> {
        let target = self.fleet.target(self.path);
        let warm_up = self.scale.warm_up();
        let session = Session::open(target, Sockets::of(warm_up.streams)).await?;
        let mut faults = session.run(&warm_up).await.faults;
        drop(session);
        let unconnected = self.fleet.usage(self.path)?;
        let session = Session::open(target, self.scale.sockets()).await?;
        let connected = self.fleet.usage(self.path)?;
        let load = self.scale.load(self.size);
        let running = timeout(self.time_limit(), session.run(&load));
        let (observed, ended) = tokio::join!(self.observe(&session), running);
        let mut observed = observed?;
        observed.steady.fault_foreign_stamps();
        observed.early.add_faults(&observed.steady);
        match &ended {
            Ok(rest) => observed.early.add_faults(rest),
            // Queued requests would wait forever, and end with the session.
            Err(_) if self.scale.is_queue() => {}
            Err(_) => {
                let fault = "streams have not ended in time".to_owned();
                observed.early.fault(fault);
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
            round: self.round(&observed, before),
            times: observed.steady.times,
            faults,
        })
    }

    /// Time limit of the load.
    fn time_limit(&self) -> Duration {
        let measured = self.scale.settled_after() + self.scale.window(self.size) + SETTLE;
        if self.scale.is_queue() {
            measured
        } else {
            measured + self.scale.ramp() + GRACE
        }
    }

    async fn observe(&self, session: &Session) -> anyhow::Result<Observed> {
        sleep(self.scale.settled_after()).await;
        let early = session.take();
        let first = self.fleet.usage(self.path)?;
        sleep(self.scale.window(self.size)).await;
        let second = self.fleet.usage(self.path)?;
        Ok(Observed {
            early,
            steady: session.take(),
            usage: first.zip(second),
        })
    }

    /// Checks that all streams were open in the window.
    fn check_open(&self, observed: &mut Observed) {
        let (early, steady) = (&observed.early, &observed.steady);
        let open = if self.scale.is_queue() {
            early.answered + steady.answered
        } else {
            let ended = early.requests + steady.requests;
            early.started.saturating_sub(ended)
        };
        let streams = self.scale.streams();
        if open != u64::from(streams) {
            let fault = format!("{open} of {streams} streams were open all the time");
            observed.early.fault(fault);
        }
    }

    fn round(&self, observed: &Observed, before: Option<Usage>) -> Round {
        let scenario = Scenario::Scale(self.scale);
        let usage = observed.usage;
        let cpu = usage.map(|(first, second)| scenario.cpu(first, second));
        let rss_bytes = usage.map(|(_, second)| second.rss_bytes);
        let growth = |(after, before): (u64, Usage)| count(after) - count(before.rss_bytes);
        let grown = rss_bytes.zip(before).map(growth);
        Round {
            rss_per_stream: grown.map(|bytes| bytes / f64::from(self.scale.size)),
            faults: observed.early.fault_count,
            ..Round::of(&observed.steady, cpu, rss_bytes)
        }
    }
}
