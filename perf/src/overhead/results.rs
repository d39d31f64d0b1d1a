//! Results of all rounds. A cell is one measured path under one load.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use serde::Serialize;

use super::path::MeasuredPath;
use super::scenario::Scenario;
use super::timing::TimingCost;
use crate::load_stats::{LatencyHistograms, LoadStats, Rates};
use crate::statistics::{Percentiles, Spread, count_to_f64};

/// Maximum difference between the bytes per token of two paths with the same format. Ids and creation times have the
/// same length on every path, but a timestamp may gain a digit between two turns.
const MAX_BYTES_DIFFERENCE: f64 = 0.5;

/// Results of one run.
#[derive(Debug, Default)]
pub(crate) struct Results {
    cells: BTreeMap<CellKey, Cell>,
    /// Cost of timing the stages of a token, for each round.
    timing: Vec<TimingCost>,
}

/// Load and path that identify a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct CellKey {
    pub(crate) scenario: Scenario,
    pub(crate) path: MeasuredPath,
}

impl CellKey {
    pub(crate) fn new(scenario: Scenario, path: MeasuredPath) -> Self {
        Self { scenario, path }
    }
}

/// Result of one turn: one round of one cell.
#[derive(Debug)]
pub(super) struct TurnResult {
    pub(super) round: Round,
    pub(super) times: LatencyHistograms,
    pub(super) faults: Vec<String>,
}

/// Results of one path under one load.
#[derive(Debug)]
pub(crate) struct Cell {
    /// Rounds in the order in which they were measured.
    pub(crate) rounds: Vec<Round>,
    /// Latency histograms, merged over all rounds.
    pub(crate) times: LatencyHistograms,
}

/// Result of one round of a cell.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Round {
    #[serde(flatten)]
    pub(crate) rates: Rates,
    /// Length of a token's line or message in bytes, without response heads and HTTP/2 frames.
    pub(crate) line_bytes_per_token: f64,
    /// Processor time of the server's processes per token. `None` without a server.
    pub(crate) cpu_us_per_token: Option<f64>,
    /// Resident memory of the server's processes after the round. `None` without a server.
    pub(crate) rss_bytes: Option<u64>,
    pub(crate) one_way_p50_us: f64,
    pub(crate) one_way_p99_us: f64,
    pub(crate) ttft_p50_us: f64,
    pub(crate) ttft_p99_us: f64,
    /// Median delay of the load generator in starting its streams.
    pub(crate) sender_p50_us: f64,
    /// Share of one processor that the load generator used, which is a single thread.
    pub(crate) load_share: f64,
    /// Growth of the server's memory per stream, in bytes. `None` if it was not measured.
    pub(crate) rss_per_stream: Option<f64>,
    /// Number of streams that failed.
    pub(crate) faults: u32,
}

impl Round {
    pub(crate) fn from_stats(
        stats: &LoadStats,
        cpu: Option<Duration>,
        rss_bytes: Option<u64>,
    ) -> Self {
        let tokens = count_to_f64(stats.tokens);
        let one_way = Percentiles::from_histogram(&stats.times.one_way);
        let ttft = Percentiles::from_histogram(&stats.times.ttft);
        Self {
            rates: stats.rates(),
            line_bytes_per_token: count_to_f64(stats.token_bytes) / tokens,
            cpu_us_per_token: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / tokens),
            rss_bytes,
            one_way_p50_us: one_way.p50,
            one_way_p99_us: one_way.p99,
            ttft_p50_us: ttft.p50,
            ttft_p99_us: ttft.p99,
            sender_p50_us: Percentiles::from_histogram(&stats.times.sender).p50,
            load_share: stats.load_share,
            rss_per_stream: None,
            faults: stats.fault_count,
        }
    }
}

impl Results {
    pub(super) fn add(&mut self, key: CellKey, round: Round, times: &LatencyHistograms) {
        match self.cells.entry(key) {
            Entry::Occupied(mut cell) => {
                let cell = cell.get_mut();
                cell.times.add(times);
                cell.rounds.push(round);
            }
            Entry::Vacant(cell) => {
                cell.insert(Cell {
                    rounds: vec![round],
                    times: times.clone(),
                });
            }
        }
    }

    /// Adds the cost of timing the stages of a token, as measured in a round.
    pub(super) fn add_timing(&mut self, cost: TimingCost) {
        self.timing.push(cost);
    }

    /// Returns the cost of timing the stages of a token, in percent of the CPU time per token in this cell.
    pub(super) fn timing_share(&self, key: CellKey, of: fn(&TimingCost) -> f64) -> Option<Spread> {
        let rounds = self.timing.iter().zip(&self.cell(key)?.rounds);
        Spread::from_rounds(rounds.map(|(cost, round)| {
            let token_ns = round.cpu_us_per_token? * 1e3;
            Some(of(cost) / token_ns * 100.0)
        }))
    }

    pub(crate) fn cells(&self) -> impl Iterator<Item = (CellKey, &Cell)> {
        self.cells.iter().map(|(key, cell)| (*key, cell))
    }

    pub(super) fn cells_of(
        &self,
        scenario: Scenario,
    ) -> impl Iterator<Item = (MeasuredPath, &Cell)> {
        let cells = self
            .cells()
            .filter(move |(key, _)| key.scenario == scenario);
        cells.map(|(key, cell)| (key.path, cell))
    }

    pub(super) fn cell(&self, key: CellKey) -> Option<&Cell> {
        self.cells.get(&key)
    }

    /// Describes the paths whose tokens have another length than those of their floors. They cannot be compared.
    pub(super) fn find_unlike_floors(&self) -> Vec<String> {
        let bytes = |cell: &Cell| {
            let spread = cell.spread(|round| Some(round.line_bytes_per_token));
            spread.map(|spread| spread.median)
        };
        let unlike = |(CellKey { scenario, path }, cell): (CellKey, &Cell)| {
            let floor = path
                .floor()
                .filter(|floor| floor.stream_format() == path.stream_format())?;
            let of_floor = self.cell(CellKey::new(scenario, floor))?;
            let (own, of_floor) = (bytes(cell)?, bytes(of_floor)?);
            let (title, path, floor) = (scenario.title(), path.title(), floor.title());
            let why = format!(
                "{title}: a token is {own:.1} bytes on {path} and {of_floor:.1} on {floor}"
            );
            ((own - of_floor).abs() > MAX_BYTES_DIFFERENCE).then_some(why)
        };
        self.cells().filter_map(unlike).collect()
    }

    /// Compares a value with the value of another cell, round by round. In a round, both were measured soon after each
    /// other, so a longer disturbance of the machine disturbs both.
    pub(super) fn compare(
        &self,
        key: CellKey,
        beside: CellKey,
        value: impl Fn(&Round) -> Option<f64>,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<Spread> {
        let rounds = self.cell(key)?.rounds.iter();
        let rounds = rounds.zip(&self.cell(beside)?.rounds);
        let compared = rounds.map(|(own, other)| Some(compare(value(own)?, value(other)?)));
        Spread::from_rounds(compared)
    }
}

impl Cell {
    pub(crate) fn spread(&self, value: impl Fn(&Round) -> Option<f64>) -> Option<Spread> {
        Spread::from_rounds(self.rounds.iter().map(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_whose_lines_differ_from_its_floors_is_reported() {
        let unlike = |path: MeasuredPath, bytes: f64| {
            let mut results = Results::default();
            for (path, line_bytes_per_token) in [(MeasuredPath::BareAxum, 190.0), (path, bytes)] {
                let round = Round {
                    line_bytes_per_token,
                    ..Round::default()
                };
                let key = CellKey::new(Scenario::Short, path);
                results.add(key, round, &LatencyHistograms::default());
            }
            results.find_unlike_floors().concat()
        };
        assert_eq!(unlike(MeasuredPath::Ndjson, 190.4), "");
        // A floor of another format is not comparable.
        assert_eq!(unlike(MeasuredPath::Sse, 196.0), "");
        let reported = unlike(MeasuredPath::Ndjson, 189.0);
        let reason = "189.0 bytes on HTTP NDJSON";
        assert!(reported.contains(reason), "{reported}");
    }
}
