//! The plan of a run: the paths under each load, the number of rounds, and the order of turns.

use clap::ValueEnum;

use super::Options;
use super::path::MeasuredPath;
use super::scale::Shape;
use super::scenario::{Scenario, Size};
use super::targets;

/// Kind of load, by which loads are selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadKind {
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

/// Loads of a run.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) loads: Vec<PlannedLoad>,
    pub(super) size: Size,
}

/// A load, and the paths that take turns under it.
#[derive(Debug)]
pub(super) struct PlannedLoad {
    pub(super) scenario: Scenario,
    pub(super) paths: Vec<MeasuredPath>,
    pub(super) rounds: u32,
}

const ROUNDS: u32 = 5;

/// Factor for rounds with a single stream. Its latency is mostly a processor's wake-up, which changes from
/// second to second by more than an API adds: so its turns are short and many.
const SINGLE_STREAM_ROUNDS_FACTOR: u32 = 3;

/// Upper bound of the rounds with thousands of streams. A turn takes a quarter of a minute, and its limits
/// are wide.
const MAX_SCALE_ROUNDS: u32 = 3;

/// Open files of a process besides the sockets of its streams.
const OTHER_FILES: u32 = 256;

impl Plan {
    pub(super) fn of(options: &Options) -> Self {
        let quick = options.quick;
        let size = if quick { Size::QUICK } else { Size::WHOLE };
        let rounds = options.rounds.unwrap_or(ROUNDS);
        let loads = scenarios(options, size)
            .into_iter()
            .map(|scenario| PlannedLoad {
                scenario,
                paths: paths(options, scenario),
                rounds: match scenario {
                    Scenario::Paced(1) => rounds * SINGLE_STREAM_ROUNDS_FACTOR,
                    Scenario::Scale(_) => rounds.min(MAX_SCALE_ROUNDS),
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

    /// Number of rounds.
    pub(super) fn rounds(&self) -> u32 {
        self.loads.iter().map(|load| load.rounds).max().unwrap_or(0)
    }

    /// Number of turns in all rounds.
    pub(super) fn turns(&self) -> u64 {
        let turns = self.loads.iter().map(|load| {
            let paths = u64::try_from(load.paths.len()).unwrap_or(0);
            paths * u64::from(load.rounds)
        });
        turns.sum()
    }

    /// Files that a process of this run may have open at once.
    pub(super) fn open_files(&self) -> u32 {
        let loads = self.loads.iter();
        let sockets = loads.map(|load| load.scenario.sockets().streams);
        sockets.max().unwrap_or(0) + OTHER_FILES
    }
}

fn paths(options: &Options, scenario: Scenario) -> Vec<MeasuredPath> {
    let is_queue = matches!(scenario, Scenario::Scale(scale) if scale.shape == Shape::Queued);
    match (&options.paths, scenario) {
        // Only a gRPC client can see that its request waits.
        (Some(paths), _) if is_queue => {
            let paths = paths.iter().copied();
            paths.filter(|path| *path == MeasuredPath::Grpc).collect()
        }
        (Some(paths), _) => paths.clone(),
        (None, Scenario::Scale(scale)) => scale.paths().to_vec(),
        (None, _) if options.quick => targets::needed(scenario),
        (None, _) => MeasuredPath::value_variants().to_vec(),
    }
}

fn scenarios(options: &Options, size: Size) -> Vec<Scenario> {
    let quick = options.quick;
    let default: &[u32] = if quick { &[1, 64] } else { &[1, 64, 512] };
    let streams = options.streams.as_deref().unwrap_or(default).iter();
    let kinds = options.loads.clone().unwrap_or_else(|| {
        let all = LoadKind::value_variants().iter().copied();
        all.filter(|kind| *kind != LoadKind::Scale || !quick)
            .collect()
    });
    let of_kind = |kind: LoadKind| match kind {
        LoadKind::Paced => streams.clone().map(|n| Scenario::Paced(*n)).collect(),
        LoadKind::Full => {
            // A single stream at full speed says little: it shares no write with others.
            let streams = streams.clone().filter(|n| !quick || **n > 1);
            streams.map(|n| Scenario::Full(*n)).collect()
        }
        LoadKind::Short => vec![Scenario::Short],
        LoadKind::OpenLoop => vec![Scenario::OpenLoop],
        LoadKind::Scale => Scenario::scales(size).to_vec(),
    };
    kinds.into_iter().flat_map(of_kind).collect()
}

impl PlannedLoad {
    /// Order of the paths in a round. Over the rounds each path follows each other one equally often: in
    /// twice as many rounds as there are paths, or in as many if their number is even. The orders are a
    /// Latin square of E. J. Williams (1949).
    pub(super) fn order(&self, round: u32) -> Vec<MeasuredPath> {
        let paths = self.paths.len();
        let round = usize::try_from(round).unwrap_or(0);
        // 0, 1, -1, 2, -2, …: each step has another length.
        let zigzag = (0..paths).map(|place| match place % 2 {
            0 => paths - place / 2,
            _ => place.div_ceil(2),
        });
        let order = zigzag.map(|place| self.paths[(round + place) % paths]);
        if paths % 2 == 1 && round % 2 == 1 {
            order.rev().collect()
        } else {
            order.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use super::*;

    #[test]
    fn over_the_rounds_every_path_follows_every_other_equally_often() {
        let all = MeasuredPath::value_variants();
        for paths in 2..=all.len() {
            let load = PlannedLoad {
                scenario: Scenario::Short,
                paths: all[..paths].to_vec(),
                rounds: 1,
            };
            let rounds = if paths % 2 == 0 { paths } else { 2 * paths };
            let mut followed: HashMap<_, usize> = HashMap::new();
            for round in 0..u32::try_from(rounds).unwrap() {
                let order = load.order(round);
                assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), paths);
                for pair in order.windows(2) {
                    *followed.entry((pair[0], pair[1])).or_default() += 1;
                }
            }
            assert_eq!(followed.len(), paths * (paths - 1));
            let each = rounds / paths;
            assert!(followed.values().all(|times| *times == each), "{paths}");
        }
    }
}
