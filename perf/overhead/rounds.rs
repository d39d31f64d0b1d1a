//! The rounds of a run: in each, the lanes take turns under one load after the other.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::RunError;
use super::fleet::{Fleet, Setup};
use super::lane::Lane;
use super::plan::Plan;
use super::results::{Outcome, Place, Results, Round};
use super::scale;
use super::scenario::{PACED, Scenario, Size};
use super::timing::TimingCost;
use crate::load::Session;
use crate::open_files;

/// As fast as tokens are read.
const FULL: Duration = Duration::ZERO;

/// Runs all rounds. What went wrong with a stream is told beside the results.
pub(super) async fn measure(plan: &Plan) -> Result<(Results, Vec<String>), RunError> {
    open_files::allow(plan.open_files())?;
    let fleets = Fleets {
        paced: Fleet::start(&lanes(plan, PACED), Setup::of_interval(PACED)).await?,
        full: Fleet::start(&lanes(plan, FULL), Setup::of_interval(FULL)).await?,
    };
    let (mut results, mut faults) = (Results::default(), Vec::new());
    let progress = progress_of(plan.turns());
    for round in 0..plan.rounds() {
        results.add_timing(TimingCost::now());
        for load in plan.loads.iter().filter(|load| round < load.rounds) {
            for lane in load.order(round) {
                let place = format!("{}, {}", load.scenario.title(), lane.title());
                progress.set_message(place.clone());
                let outcome = fleets.turn(load.scenario, lane, plan.size).await?;
                if let Some((round, times)) = outcome.measured {
                    results.add(Place(load.scenario, lane), round, &times);
                }
                let told = outcome.faults.iter();
                faults.extend(told.map(|fault| format!("{place}, round {round}: {fault}")));
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    fleets.paced.stop().await?;
    fleets.full.stop().await?;
    Ok((results, faults))
}

/// The servers that take turns.
struct Fleets {
    paced: Fleet,
    full: Fleet,
}

impl Fleets {
    /// One lane's turn under one load.
    async fn turn(&self, scenario: Scenario, lane: Lane, size: Size) -> Result<Outcome, RunError> {
        let fleet = match scenario {
            Scenario::Scale(scale) => return scale::turn(scale, lane, size).await,
            Scenario::Paced(_) => &self.paced,
            Scenario::Full(_) | Scenario::Short | Scenario::OpenLoop => &self.full,
        };
        let session = match Session::open(fleet.target(lane), scenario.sockets()).await {
            Ok(session) => session,
            Err(fault) => return Ok(Outcome::of_fault(&fault)),
        };
        let mut faults = session.run(&scenario.warm_up(size)).await.faults;
        let before = fleet.usage(lane)?;
        let figures = session.run(&scenario.load(size)).await;
        let after = fleet.usage(lane)?;
        let cpu = before
            .zip(after)
            .map(|(before, after)| scenario.cpu(before, after));
        let round = Round::of(&figures, cpu, after.map(|after| after.rss_bytes));
        faults.extend(figures.faults);
        Ok(Outcome {
            measured: Some((round, figures.times)),
            faults,
        })
    }
}

/// The lanes that need a server of this cadence.
fn lanes(plan: &Plan, interval: Duration) -> BTreeSet<Lane> {
    let loads = plan.loads.iter();
    loads
        .filter(|load| load.scenario.interval() == Some(interval))
        .flat_map(|load| load.lanes.iter().copied())
        .collect()
}

/// A bar on standard error for so many turns; nothing where that is no terminal.
pub(crate) fn progress_of(turns: u64) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(turns), target);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.expect("the template is valid"));
    bar
}
