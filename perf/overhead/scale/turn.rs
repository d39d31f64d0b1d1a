//! One lane's turn with thousands of streams, on servers of its own that nothing was asked of before: what
//! their memory grows by is the streams'.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{SETTLE, Scale};
use crate::load::{Figures, Session, Sockets};
use crate::overhead::RunError;
use crate::overhead::fleet::Fleet;
use crate::overhead::lane::Lane;
use crate::overhead::results::{Outcome, Round};
use crate::overhead::scenario::{Scenario, Size};
use crate::overhead::statistics::count;
use crate::process::Usage;

/// How much longer than they should streams may take to end.
const GRACE: Duration = Duration::from_secs(30);

/// Takes the turn, of which only a window counts, in which all streams are open.
pub(in crate::overhead) async fn turn(
    scale: Scale,
    lane: Lane,
    size: Size,
) -> Result<Outcome, RunError> {
    let fleet = Fleet::start(&BTreeSet::from([lane]), scale.setup()).await?;
    let turn = Turn {
        scale,
        lane,
        size,
        fleet: &fleet,
    };
    let outcome = turn.take().await;
    fleet.stop().await?;
    outcome
}

struct Turn<'a> {
    scale: Scale,
    lane: Lane,
    size: Size,
    fleet: &'a Fleet,
}

/// What was seen while all streams were open.
struct Seen {
    /// Up to the window.
    early: Figures,
    /// In the window.
    steady: Figures,
    /// What the servers had used at its beginning and at its end.
    usage: Option<(Usage, Usage)>,
}

impl Turn<'_> {
    async fn take(&self) -> Result<Outcome, RunError> {
        let mut outcome = Outcome::default();
        let target = self.fleet.target(self.lane);
        let warm_up = self.scale.warm_up();
        match Session::open(target, Sockets::of(warm_up.streams)).await {
            Ok(session) => outcome.faults.extend(session.run(&warm_up).await.faults),
            Err(fault) => return Ok(Outcome::of_fault(&fault)),
        }
        let unconnected = self.fleet.usage(self.lane)?;
        let session = match Session::open(target, self.scale.sockets()).await {
            Ok(session) => session,
            Err(fault) => return Ok(Outcome::of_fault(&fault)),
        };
        let connected = self.fleet.usage(self.lane)?;
        let load = self.scale.load(self.size);
        let running = timeout(self.lasts(), session.run(&load));
        let (seen, ended) = tokio::join!(self.watch(&session), running);
        let mut seen = seen?;
        seen.early.add_faults(&seen.steady);
        match (&ended, self.scale) {
            (Ok(rest), _) => seen.early.add_faults(rest),
            // They would wait for ever, and go when the session does.
            (Err(_), Scale::Queued(_)) => {}
            (Err(_), _) => seen
                .early
                .fault("streams have not ended in time".to_owned()),
        }
        self.check_open(&mut seen);
        let before = match self.scale {
            Scale::Queued(_) => connected,
            Scale::Many(_) | Scale::Few(_) | Scale::Slow(_) => unconnected,
        };
        outcome.faults.extend(seen.early.faults.clone());
        outcome.measured = Some((self.round(&seen, before), seen.steady.times));
        Ok(outcome)
    }

    /// How long the load may run.
    fn lasts(&self) -> Duration {
        let measured = self.scale.settled_after() + self.scale.window(self.size) + SETTLE;
        match self.scale {
            Scale::Queued(_) => measured,
            Scale::Many(_) | Scale::Few(_) | Scale::Slow(_) => measured + self.scale.ramp() + GRACE,
        }
    }

    async fn watch(&self, session: &Session) -> Result<Seen, RunError> {
        sleep(self.scale.settled_after()).await;
        let early = session.take();
        let first = self.fleet.usage(self.lane)?;
        sleep(self.scale.window(self.size)).await;
        let second = self.fleet.usage(self.lane)?;
        Ok(Seen {
            early,
            steady: session.take(),
            usage: first.zip(second),
        })
    }

    /// Whether all streams were open in the window.
    fn check_open(&self, seen: &mut Seen) {
        let (early, steady) = (&seen.early, &seen.steady);
        let open = match self.scale {
            Scale::Queued(_) => early.answered + steady.answered,
            Scale::Many(_) | Scale::Few(_) | Scale::Slow(_) => {
                early.begun.saturating_sub(early.requests + steady.requests)
            }
        };
        let streams = self.scale.streams();
        if open != u64::from(streams) {
            let fault = format!("{open} of {streams} streams were open all the time");
            seen.early.fault(fault);
        }
    }

    fn round(&self, seen: &Seen, before: Option<Usage>) -> Round {
        let scenario = Scenario::Scale(self.scale);
        let cpu = seen
            .usage
            .map(|(first, second)| scenario.cpu(first, second));
        let rss_bytes = seen.usage.map(|(_, second)| second.rss_bytes);
        let streams = match self.scale {
            Scale::Many(streams)
            | Scale::Few(streams)
            | Scale::Slow(streams)
            | Scale::Queued(streams) => streams,
        };
        let grown = rss_bytes
            .zip(before)
            .map(|(after, before)| count(after) - count(before.rss_bytes));
        Round {
            rss_per_stream: grown.map(|bytes| bytes / f64::from(streams)),
            faults: seen.early.fault_count,
            ..Round::of(&seen.steady, cpu, rss_bytes)
        }
    }
}
