//! The plan of a run: the paths to measure under each load, the number of rounds, and the order of turns.

use clap::ValueEnum;

use super::Options;
use super::path::MeasuredPath;
use super::scale::Shape;
use super::scenario::{RunSize, Scenario};
use super::targets;

/// Kind of load, by which `--loads` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadKind {
    /// Streams of 50 tokens/s.
    Paced,
    /// Streams whose tokens are generated as fast as the client reads.
    Full,
    /// Short requests, each sent as soon as the previous one is answered.
    Short,
    /// Short requests, sent at a rate of 1,000 per second.
    OpenLoop,
    /// Thousands of concurrent streams, and thousands of queued requests.
    Scale,
}

/// The loads of a run, with their paths.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) loads: Vec<PlannedLoad>,
    pub(super) size: RunSize,
}

/// A load, and the paths that take turns under it.
#[derive(Debug)]
pub(super) struct PlannedLoad {
    pub(super) scenario: Scenario,
    pub(super) paths: Vec<MeasuredPath>,
    pub(super) rounds: u32,
}

const DEFAULT_ROUNDS: u32 = 5;
/// Factor by which loads with a single stream have more rounds. The latency of a single stream is mostly the time that
/// a processor needs to wake up. That time varies by more than an API adds, so many short turns are measured.
const SINGLE_STREAM_ROUNDS_FACTOR: u32 = 3;
/// Factor by which a whole run has more rounds with 64 streams, which most targets judge. The median of five rounds
/// varies by several percent, and the target for the log allows two.
const JUDGED_ROUNDS_FACTOR: u32 = 3;
/// Maximum number of rounds with thousands of streams. A turn takes 15 seconds, and its targets have wide margins.
const MAX_SCALE_ROUNDS: u32 = 3;
/// Number of files that a process may have open in addition to the sockets of its streams.
const OTHER_OPEN_FILES: u32 = 256;

impl Plan {
    pub(super) fn from_options(options: &Options) -> Self {
        let quick = options.quick;
        let size = if quick {
            RunSize::QUICK
        } else {
            RunSize::WHOLE
        };
        let rounds = options.rounds.unwrap_or(DEFAULT_ROUNDS);
        let loads = scenarios(options, size)
            .into_iter()
            .map(|scenario| PlannedLoad {
                scenario,
                paths: paths_under(options, scenario),
                rounds: match scenario {
                    Scenario::Paced(1) => rounds * SINGLE_STREAM_ROUNDS_FACTOR,
                    Scenario::Scale(_) => rounds.min(MAX_SCALE_ROUNDS),
                    Scenario::Paced(64) | Scenario::Full(64) if !quick => {
                        rounds * JUDGED_ROUNDS_FACTOR
                    }
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

    /// Returns the largest number of rounds of any load.
    pub(super) fn rounds(&self) -> u32 {
        self.loads.iter().map(|load| load.rounds).max().unwrap_or(0)
    }

    pub(super) fn turns(&self) -> u64 {
        let turns = self.loads.iter().map(|load| {
            let paths = u64::try_from(load.paths.len()).unwrap_or(0);
            paths * u64::from(load.rounds)
        });
        turns.sum()
    }

    /// Returns the number of files that a process of this run may have open at the same time.
    pub(super) fn open_files(&self) -> u32 {
        let loads = self.loads.iter();
        let connection_plan = loads.map(|load| load.scenario.connection_plan().streams);
        connection_plan.max().unwrap_or(0) + OTHER_OPEN_FILES
    }
}

fn paths_under(options: &Options, scenario: Scenario) -> Vec<MeasuredPath> {
    let is_queue = matches!(scenario, Scenario::Scale(scale) if scale.shape == Shape::Queued);
    match (&options.paths, scenario) {
        // Only a gRPC client can see that its request is queued.
        (Some(paths), _) if is_queue => {
            let paths = paths.iter().copied();
            paths.filter(|path| *path == MeasuredPath::Grpc).collect()
        }
        (Some(paths), _) => paths.clone(),
        (None, Scenario::Scale(scale)) => scale.paths().to_vec(),
        (None, _) if options.quick => targets::paths_needed(scenario),
        (None, _) => {
            let all = MeasuredPath::value_variants().iter().copied();
            all.filter(|path| path.is_measured_under(scenario))
                .collect()
        }
    }
}

fn scenarios(options: &Options, size: RunSize) -> Vec<Scenario> {
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
    /// Returns the order of the paths in a round. The orders are a Latin square of E. J. Williams (1949): over twice
    /// as many rounds as there are paths (or as many rounds, if the number of paths is even), each path directly
    /// follows each other path equally often.
    pub(super) fn turn_order(&self, round: u32) -> Vec<MeasuredPath> {
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
                let order = load.turn_order(round);
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
