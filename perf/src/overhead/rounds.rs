//! Runs the rounds: in each round, the paths take turns under one load after the other.

use std::time::Duration;

use super::fleet::Fleet;
use super::path::MeasuredPath;
use super::plan::Plan;
use super::results::{CellKey, Results, Round, TurnResult};
use super::scale;
use super::scenario::{PACED_INTERVAL, RunSize, Scenario};
use super::timing::TimingCost;
use crate::fault::Fault;
use crate::load::LoadGenerator;
use crate::open_files;
use crate::progress;
use crate::serve::{self, Role};

/// Interval between tokens at full speed.
const FULL_SPEED: Duration = Duration::ZERO;
/// Number of slots, and of requests that may wait in the queue, of each server.
const SLOTS: usize = 1024;

/// Runs all rounds. Returns the results and the faults of streams.
pub(super) async fn measure_rounds(plan: &Plan) -> anyhow::Result<(Results, Vec<String>)> {
    open_files::raise_limit(plan.open_files())?;
    let fleets = Fleets {
        paced: start_fleet(plan, PACED_INTERVAL).await?,
        full: start_fleet(plan, FULL_SPEED).await?,
    };
    let (mut results, mut faults) = (Results::default(), Vec::new());
    let bar = progress::create_bar(plan.turns(), "{bar:30} {pos}/{len} {elapsed} {msg}");
    for round in 0..plan.rounds() {
        results.add_timing(TimingCost::measure());
        for load in plan.loads.iter().filter(|load| round < load.rounds) {
            let scenario = load.scenario;
            for path in load.turn_order(round) {
                let title = format!("{}, {}", scenario.title(), path.title());
                bar.set_message(title.clone());
                bar.inc(1);
                let of_turn = match fleets.run_turn(scenario, path, plan.size).await {
                    Ok(turn) => {
                        let key = CellKey::new(scenario, path);
                        results.add(key, turn.round, &turn.times);
                        turn.faults
                    }
                    // A server that cannot be reached does not prevent the other turns.
                    Err(error) => vec![error.downcast::<Fault>()?.to_string()],
                };
                let of_turn = of_turn.iter();
                faults.extend(of_turn.map(|fault| format!("{title}, round {round}: {fault}")));
            }
        }
    }
    bar.finish_and_clear();
    Ok((results, faults))
}

/// The servers that take turns, paced and at full speed.
struct Fleets {
    paced: Fleet,
    full: Fleet,
}

impl Fleets {
    async fn run_turn(
        &self,
        scenario: Scenario,
        path: MeasuredPath,
        size: RunSize,
    ) -> anyhow::Result<TurnResult> {
        let fleet = match scenario {
            Scenario::Scale(scale) => return scale::run_turn(scale, path, size).await,
            Scenario::Paced(_) => &self.paced,
            Scenario::Full(_) | Scenario::Short | Scenario::OpenLoop => &self.full,
        };
        let generator = LoadGenerator::open(fleet.target(path), scenario.connection_plan()).await?;
        let mut faults = generator.run(&scenario.warm_up(size)).await.faults;
        let before = fleet.usage(path)?;
        let mut stats = generator.run(&scenario.load(size)).await;
        stats.record_foreign_timestamps();
        let after = fleet.usage(path)?;
        let usage = before.zip(after);
        let cpu = usage.map(|(before, after)| scenario.counted_cpu(before, after));
        faults.extend(stats.faults.clone());
        Ok(TurnResult {
            round: Round::from_stats(&stats, cpu, after.map(|after| after.rss_bytes)),
            times: stats.times,
            faults,
        })
    }
}

/// Starts the servers of the paths whose loads have this interval between tokens. No stream waits for a slot.
async fn start_fleet(plan: &Plan, interval: Duration) -> anyhow::Result<Fleet> {
    let loads = plan.loads.iter();
    let loads = loads.filter(|load| load.scenario.token_interval() == Some(interval));
    let paths = loads.flat_map(|load| load.paths.iter().copied()).collect();
    let options = serve::Options::new(Role::Product, interval, SLOTS, SLOTS);
    Fleet::start(&paths, options).await
}
