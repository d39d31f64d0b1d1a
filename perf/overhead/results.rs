//! What all rounds of a run came to, cell by cell: one lane under one load.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::lane::Lane;
use super::scenario::Scenario;
use super::statistics::{Spread, count};
use super::timing::TimingCost;
use crate::load::{Fault, Figures, Times};

/// One run.
#[derive(Debug, Default)]
pub(crate) struct Results {
    cells: BTreeMap<Place, Cell>,
    /// What it took in each round to time the stages of tokens.
    timing: Vec<TimingCost>,
}

/// By how much tokens of the same form may differ: an id and a time of creation are of one length everywhere,
/// but a stamp may have got a digit more between two turns.
const SAME_BYTES: f64 = 0.5;

/// A lane under a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place(pub(crate) Scenario, pub(crate) Lane);

/// What came of one lane's turn.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// `None` where there was nothing to measure.
    pub(crate) measured: Option<(Round, Times)>,
    /// What went wrong with its streams.
    pub(crate) faults: Vec<String>,
}

/// One lane under one load.
#[derive(Debug)]
pub(crate) struct Cell {
    /// In the order in which they were measured.
    pub(crate) rounds: Vec<Round>,
    /// The times of all rounds.
    pub(crate) times: Times,
}

/// What one round came to.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct Round {
    pub(crate) tokens: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) requests_per_second: f64,
    pub(crate) tokens_per_read: f64,
    pub(crate) bytes_per_token: f64,
    /// Without heads and frames: the line or the message of a token alone.
    pub(crate) line_bytes_per_token: f64,
    /// Processor time of the server's processes for each token; `None` without a server.
    pub(crate) cpu_us_per_token: Option<f64>,
    /// Resident memory of the server's processes after the round.
    pub(crate) rss_bytes: Option<u64>,
    pub(crate) one_way_p50_us: f64,
    pub(crate) one_way_p99_us: f64,
    pub(crate) ttft_p50_us: f64,
    pub(crate) ttft_p99_us: f64,
    /// How late the load itself began its streams.
    pub(crate) sender_p50_us: f64,
    /// The share of one processor that the load took, which is one thread.
    pub(crate) load_share: f64,
    /// What the servers' memory grew by for each stream, in bytes; `None` where that was not looked at.
    pub(crate) rss_per_stream: Option<f64>,
    /// How many streams were no good.
    pub(crate) faults: u32,
}

impl Round {
    pub(super) fn of(figures: &Figures, cpu: Option<Duration>, rss_bytes: Option<u64>) -> Self {
        let tokens = count(figures.tokens);
        let seconds = count(figures.elapsed_ns) / 1e9;
        let us = |histogram: &Histogram<u64>, quantile: f64| {
            count(histogram.value_at_quantile(quantile)) / 1e3
        };
        let times = &figures.times;
        Self {
            tokens: figures.tokens,
            tokens_per_second: tokens / seconds,
            requests_per_second: count(figures.requests) / seconds,
            tokens_per_read: tokens / count(figures.reads),
            bytes_per_token: count(figures.bytes) / tokens,
            line_bytes_per_token: count(figures.token_bytes) / tokens,
            cpu_us_per_token: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / tokens),
            rss_bytes,
            one_way_p50_us: us(&times.one_way, 0.5),
            one_way_p99_us: us(&times.one_way, 0.99),
            ttft_p50_us: us(&times.ttft, 0.5),
            ttft_p99_us: us(&times.ttft, 0.99),
            sender_p50_us: us(&times.sender, 0.5),
            load_share: figures.load_share,
            rss_per_stream: None,
            faults: figures.fault_count,
        }
    }
}

impl Outcome {
    /// A turn of which nothing came.
    pub(super) fn of_fault(fault: &Fault) -> Self {
        Self {
            measured: None,
            faults: vec![fault.to_string()],
        }
    }
}

impl Results {
    pub(super) fn add(&mut self, place: Place, round: Round, times: &Times) {
        match self.cells.entry(place) {
            std::collections::btree_map::Entry::Occupied(mut cell) => {
                let cell = cell.get_mut();
                cell.times.add(times);
                cell.rounds.push(round);
            }
            std::collections::btree_map::Entry::Vacant(cell) => {
                cell.insert(Cell {
                    rounds: vec![round],
                    times: times.clone(),
                });
            }
        }
    }

    /// Adds what it took in a round to time the stages of tokens.
    pub(super) fn add_timing(&mut self, cost: TimingCost) {
        self.timing.push(cost);
    }

    /// What it takes to time a token's stages, as a share of all that it costs at this place, in percent.
    pub(super) fn timing_share(
        &self,
        place: Place,
        of: impl Fn(TimingCost) -> f64,
    ) -> Option<Spread> {
        let rounds = self.timing.iter().zip(&self.cell(place)?.rounds);
        let shares: Option<Vec<_>> = rounds
            .map(|(cost, round)| Some(of(*cost) / (round.cpu_us_per_token? * 1e3) * 100.0))
            .collect();
        Spread::of(shares?)
    }

    /// All cells, load by load.
    pub(crate) fn cells(&self) -> impl Iterator<Item = (Scenario, Lane, &Cell)> {
        self.cells
            .iter()
            .map(|(Place(scenario, lane), cell)| (*scenario, *lane, cell))
    }

    pub(super) fn cell(&self, place: Place) -> Option<&Cell> {
        self.cells.get(&place)
    }

    /// Which lanes write other lines or messages than their floors, and so cannot be compared with them.
    pub(super) fn unlike_floors(&self) -> Vec<String> {
        let differing = self.cells().filter_map(|(scenario, lane, cell)| {
            let floor = lane
                .floor()
                .filter(|floor| floor.speaks() == lane.speaks())?;
            let its = self.cell(Place(scenario, floor))?;
            let bytes = |cell: &Cell| {
                Some(
                    cell.spread(|round| Some(round.line_bytes_per_token))?
                        .median,
                )
            };
            let (mine, its) = (bytes(cell)?, bytes(its)?);
            ((mine - its).abs() > SAME_BYTES).then(|| {
                let (title, lane, floor) = (scenario.title(), lane.title(), floor.title());
                format!("{title}: a token is {mine:.1} bytes on {lane} and {its:.1} on {floor}")
            })
        });
        differing.collect()
    }

    /// What a value is to that of another place, round by round: both were measured soon after each other,
    /// so what disturbs the machine for longer disturbs both.
    pub(super) fn compare(
        &self,
        (place, beside): (Place, Place),
        value: impl Fn(&Round) -> Option<f64>,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<Spread> {
        let rounds = self.cell(place)?.rounds.iter();
        let rounds = rounds.zip(&self.cell(beside)?.rounds);
        let compared: Option<Vec<_>> = rounds
            .map(|(mine, its)| Some(compare(value(mine)?, value(its)?)))
            .collect();
        Spread::of(compared?)
    }
}

impl Cell {
    /// A value over the rounds.
    pub(crate) fn spread(&self, value: impl Fn(&Round) -> Option<f64>) -> Option<Spread> {
        let values: Option<Vec<_>> = self.rounds.iter().map(value).collect();
        Spread::of(values?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_whose_lines_are_not_its_floors_is_told_and_one_of_another_form_is_not() {
        let unlike = |lane: Lane, bytes: f64| {
            let mut results = Results::default();
            for (lane, line_bytes_per_token) in [(Lane::BareAxum, 190.0), (lane, bytes)] {
                let round = Round {
                    line_bytes_per_token,
                    ..Round::default()
                };
                results.add(Place(Scenario::Short, lane), round, &Times::new());
            }
            results.unlike_floors()
        };
        assert_eq!(unlike(Lane::Ndjson, 190.4), Vec::<String>::new());
        assert_eq!(unlike(Lane::Sse, 196.0), Vec::<String>::new());
        let told = unlike(Lane::Ndjson, 189.0);
        assert!(
            told.concat().contains("189.0 bytes on HTTP NDJSON"),
            "{told:?}"
        );
    }
}
