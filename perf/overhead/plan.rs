//! What a run measures: which lanes under which loads, how often, and in which order they take turns.

use clap::ValueEnum;

use super::Options;
use super::lane::Lane;
use super::scenario::{Scenario, Size};

/// What a run measures.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) loads: Vec<Planned>,
    pub(super) rounds: u32,
    pub(super) size: Size,
}

/// A load, and the lanes that take turns under it.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) scenario: Scenario,
    pub(super) lanes: Vec<Lane>,
}

const ROUNDS: u32 = 5;

impl Plan {
    pub(super) fn of(options: &Options) -> Self {
        let lanes = |scenario: Scenario| match &options.lanes {
            Some(lanes) => lanes.clone(),
            None if options.quick => scenario.quick_lanes().to_vec(),
            None => Lane::value_variants().to_vec(),
        };
        let loads = scenarios(options).into_iter().map(|scenario| Planned {
            scenario,
            lanes: lanes(scenario),
        });
        Self {
            loads: loads.collect(),
            rounds: options.rounds.unwrap_or(ROUNDS),
            size: if options.quick {
                Size::QUICK
            } else {
                Size::WHOLE
            },
        }
    }

    /// How many turns there are in all rounds.
    pub(super) fn turns(&self) -> u64 {
        let turns: usize = self.loads.iter().map(|load| load.lanes.len()).sum();
        u64::try_from(turns).unwrap_or(0) * u64::from(self.rounds)
    }
}

fn scenarios(options: &Options) -> Vec<Scenario> {
    let default: &[u32] = if options.quick {
        &[1, 64]
    } else {
        &[1, 64, 512]
    };
    let streams = options.streams.as_deref().unwrap_or(default);
    let paced = streams.iter().map(|n| Scenario::Paced(*n));
    // At full speed a single stream says little: there is nothing to share a write with.
    let full = streams.iter().filter(|n| !options.quick || **n > 1);
    let full = full.map(|n| Scenario::Full(*n));
    let short = [Scenario::Short, Scenario::OpenLoop];
    paced.chain(full).chain(short).collect()
}

impl Planned {
    /// The order of this round, so that over the rounds each lane follows each other one as often: in two
    /// times as many rounds as there are lanes, or in as many where their number is even. It is a Latin
    /// square of E. J. Williams (1949).
    pub(super) fn order(&self, round: u32) -> Vec<Lane> {
        let lanes = self.lanes.len();
        let round = usize::try_from(round).unwrap_or(0);
        // 0, 1, -1, 2, -2 …: each step is of another length.
        let zigzag = (0..lanes).map(|place| match place % 2 {
            0 => lanes - place / 2,
            _ => place.div_ceil(2),
        });
        let order = zigzag.map(|place| self.lanes[(round + place) % lanes]);
        if lanes % 2 == 1 && round % 2 == 1 {
            order.rev().collect()
        } else {
            order.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use clap::Parser;

    use super::super::targets;
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn plan(arguments: &[&str]) -> Plan {
        let line = [&["overhead"], arguments].concat();
        Plan::of(&Line::parse_from(line).options)
    }

    #[test]
    fn over_the_rounds_every_lane_follows_every_other_equally_often() {
        let all = Lane::value_variants();
        for lanes in 2..=all.len() {
            let load = Planned {
                scenario: Scenario::Short,
                lanes: all[..lanes].to_vec(),
            };
            let rounds = if lanes % 2 == 0 { lanes } else { 2 * lanes };
            let mut followed: HashMap<_, usize> = HashMap::new();
            for round in 0..u32::try_from(rounds).unwrap() {
                let order = load.order(round);
                assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), lanes);
                for pair in order.windows(2) {
                    *followed.entry((pair[0], pair[1])).or_default() += 1;
                }
            }
            assert_eq!(followed.len(), lanes * (lanes - 1));
            let each = rounds / lanes;
            assert!(followed.values().all(|times| *times == each), "{lanes}");
        }
    }

    #[test]
    fn a_quick_run_measures_what_its_targets_need_and_nothing_else() {
        let plan = plan(&["--quick"]);
        let measured: BTreeSet<_> = plan
            .loads
            .iter()
            .flat_map(|load| load.lanes.iter().map(|lane| (load.scenario, *lane)))
            .collect();
        assert_eq!(measured, targets::needed().collect());
    }

    #[test]
    fn lanes_that_are_named_are_measured_under_every_load() {
        let plan = plan(&["--quick", "--lanes", "sse,mpsc", "--streams", "2"]);
        let scenarios: Vec<_> = plan.loads.iter().map(|load| load.scenario).collect();
        let expected = [
            Scenario::Paced(2),
            Scenario::Full(2),
            Scenario::Short,
            Scenario::OpenLoop,
        ];
        assert_eq!(scenarios, expected);
        for load in plan.loads {
            assert_eq!(load.lanes, [Lane::Sse, Lane::Mpsc]);
        }
    }
}
