//! What a run measures: which lanes under which loads, how often, and in which order they take turns.

use clap::ValueEnum;

use super::Options;
use super::lane::Lane;
use super::scale::Scale;
use super::scenario::{Scenario, Size};

/// Loads of a kind, by which they are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Streams of 50 tokens a second.
    Paced,
    /// Streams as fast as they are read.
    Full,
    /// Short requests, as fast as they are answered.
    Short,
    /// Short requests, 1,000 a second.
    OpenLoop,
    /// Thousands of streams, and of requests that wait.
    Scale,
}

/// What a run measures.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) loads: Vec<Planned>,
    pub(super) size: Size,
}

/// A load, and the lanes that take turns under it.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) scenario: Scenario,
    pub(super) lanes: Vec<Lane>,
    pub(super) rounds: u32,
}

const ROUNDS: u32 = 5;

/// What a single stream's tokens take is mostly how long a processor takes to wake up, and changes from
/// second to second by more than a door adds: so its turns are short, and each lane has so many times more.
const SINGLE: u32 = 3;

/// A turn with thousands of streams takes a quarter of a minute, and its limits are wide.
const SCALE_ROUNDS: u32 = 3;

/// Files that a process has open besides the sockets of its streams.
const OTHER_FILES: u32 = 256;

impl Plan {
    pub(super) fn of(options: &Options) -> Self {
        let size = if options.quick {
            Size::QUICK
        } else {
            Size::WHOLE
        };
        let rounds = options.rounds.unwrap_or(ROUNDS);
        let loads = scenarios(options, size)
            .into_iter()
            .map(|scenario| Planned {
                scenario,
                lanes: lanes(options, scenario),
                rounds: match scenario {
                    Scenario::Paced(1) => rounds * SINGLE,
                    Scenario::Scale(_) => rounds.min(SCALE_ROUNDS),
                    Scenario::Paced(_)
                    | Scenario::Full(_)
                    | Scenario::Short
                    | Scenario::OpenLoop => rounds,
                },
            });
        Self {
            loads: loads.collect(),
            size,
        }
    }

    /// How many rounds there are.
    pub(super) fn rounds(&self) -> u32 {
        self.loads.iter().map(|load| load.rounds).max().unwrap_or(0)
    }

    /// How many turns there are in all rounds.
    pub(super) fn turns(&self) -> u64 {
        let turns = self.loads.iter().map(|load| {
            let lanes = u64::try_from(load.lanes.len()).unwrap_or(0);
            lanes * u64::from(load.rounds)
        });
        turns.sum()
    }

    /// How many files a process of this run may have open at once.
    pub(super) fn open_files(&self) -> u32 {
        let sockets = self
            .loads
            .iter()
            .map(|load| load.scenario.sockets().streams);
        sockets.max().unwrap_or(0) + OTHER_FILES
    }
}

fn lanes(options: &Options, scenario: Scenario) -> Vec<Lane> {
    match (&options.lanes, scenario) {
        (Some(lanes), Scenario::Scale(Scale::Queued(_))) => {
            // Only here can a client see that its request waits.
            let lanes = lanes.iter().copied();
            lanes.filter(|lane| *lane == Lane::Grpc).collect()
        }
        (Some(lanes), _) => lanes.clone(),
        (None, Scenario::Scale(scale)) => scale.lanes().to_vec(),
        (None, _) if options.quick => scenario.quick_lanes().to_vec(),
        (None, _) => Lane::value_variants().to_vec(),
    }
}

fn scenarios(options: &Options, size: Size) -> Vec<Scenario> {
    let default: &[u32] = if options.quick {
        &[1, 64]
    } else {
        &[1, 64, 512]
    };
    let streams = options.streams.as_deref().unwrap_or(default).iter();
    let kinds = options.loads.clone().unwrap_or_else(|| {
        let all = Kind::value_variants().iter().copied();
        all.filter(|kind| *kind != Kind::Scale || !options.quick)
            .collect()
    });
    let of_kind = |kind: Kind| match kind {
        Kind::Paced => streams.clone().map(|n| Scenario::Paced(*n)).collect(),
        Kind::Full => {
            // At full speed a single stream says little: there is nothing to share a write with.
            let streams = streams.clone().filter(|n| !options.quick || **n > 1);
            streams.map(|n| Scenario::Full(*n)).collect()
        }
        Kind::Short => vec![Scenario::Short],
        Kind::OpenLoop => vec![Scenario::OpenLoop],
        Kind::Scale => Scale::all(size.crowd).map(Scenario::Scale).to_vec(),
    };
    kinds.into_iter().flat_map(of_kind).collect()
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

    use super::super::results::Place;
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
                rounds: 1,
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
            .flat_map(|load| load.lanes.iter().map(|lane| Place(load.scenario, *lane)))
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
