//! The rounds of a run: in each, the lanes take turns under one load after the other.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::RunError;
use super::fleet::Fleet;
use super::lane::Lane;
use super::plan::Plan;
use super::results::{Results, Round};
use super::scenario::{PACED, Scenario};
use crate::load::Session;

/// Runs all rounds. What went wrong with a stream is told beside the results.
pub(super) async fn measure(plan: &Plan) -> Result<(Results, Vec<String>), RunError> {
    let paced = Fleet::start(&lanes(plan, PACED), PACED).await?;
    let full = Fleet::start(&lanes(plan, Duration::ZERO), Duration::ZERO).await?;
    let mut rounds = Rounds {
        plan,
        results: Results::default(),
        faults: Vec::new(),
    };
    let progress = progress(plan.turns());
    for round in 0..plan.rounds {
        for load in &plan.loads {
            let scenario = load.scenario;
            let fleet = if scenario.interval() == PACED {
                &paced
            } else {
                &full
            };
            for lane in load.order(round) {
                let place = format!("{}, {}", scenario.title(), lane.title());
                progress.set_message(place.clone());
                let faults = rounds.turn(fleet, scenario, lane).await?;
                let faults = faults.iter();
                rounds
                    .faults
                    .extend(faults.map(|fault| format!("{place}, round {round}: {fault}")));
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    paced.stop().await?;
    full.stop().await?;
    Ok((rounds.results, rounds.faults))
}

struct Rounds<'a> {
    plan: &'a Plan,
    results: Results,
    faults: Vec<String>,
}

impl Rounds<'_> {
    /// One lane's turn under one load; what went wrong with its streams.
    async fn turn(
        &mut self,
        fleet: &Fleet,
        scenario: Scenario,
        lane: Lane,
    ) -> Result<Vec<String>, RunError> {
        let size = self.plan.size;
        let session = match Session::open(fleet.target(lane), scenario.sockets()).await {
            Ok(session) => session,
            Err(fault) => return Ok(vec![fault.to_string()]),
        };
        let mut faults = session.run(&scenario.warm_up(size)).await.faults;
        let before = fleet.usage(lane)?;
        let figures = session.run(&scenario.load(size)).await;
        let after = fleet.usage(lane)?;
        let cpu = before
            .zip(after)
            .map(|(before, after)| after.cpu - before.cpu);
        let round = Round::of(&figures, cpu, after.map(|after| after.rss_bytes));
        self.results.add(scenario, lane, round, &figures.times);
        faults.extend(figures.faults);
        Ok(faults)
    }
}

/// The lanes that need a server of this cadence.
fn lanes(plan: &Plan, interval: Duration) -> BTreeSet<Lane> {
    let loads = plan.loads.iter();
    loads
        .filter(|load| load.scenario.interval() == interval)
        .flat_map(|load| load.lanes.iter().copied())
        .collect()
}

fn progress(turns: u64) -> ProgressBar {
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
