//! Results of all rounds: one cell for each scenario and server.

use std::collections::BTreeSet;

use serde::Serialize;

use super::measurement::{Counts, Figure, Measurement};
use super::scenario::Scenario;
use super::servers::ServerKind;
use crate::statistics::{Spread, count_to_f64};

/// Results of one server in one scenario.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cell {
    pub(super) scenario: Scenario,
    pub(super) server: ServerKind,
    /// Measurements in the order of the rounds. `None` for a round that failed.
    pub(super) rounds: Vec<Option<Measurement>>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub(super) struct Results {
    /// Cells in the order of [`Cell::key`], because the order in which the servers run changes from round to round.
    cells: Vec<Cell>,
}

/// Maximum relative difference between the servers' counts of prompt tokens. The counts may differ a little, because
/// the prompt of a chat contains the server's own replies, and servers that round differently may choose different
/// tokens.
const MAX_PROMPT_DIFFERENCE: f64 = 0.01;

/// A difference between two servers' counts of prompt tokens, in one round of a scenario.
pub(super) struct PromptDifference {
    pub(super) text: String,
    /// True if the difference is so large that the servers cannot be compared.
    pub(super) is_large: bool,
}

impl Cell {
    fn key(&self) -> (Scenario, ServerKind) {
        (self.scenario, self.server)
    }

    /// Returns the value of a figure in each round. `None` for a round that failed.
    fn values(&self, figure: Figure) -> impl Iterator<Item = Option<f64>> {
        let value =
            move |round: &Option<Measurement>| round.as_ref()?.figures.get(&figure).copied();
        self.rounds.iter().map(value)
    }

    /// Returns the spread of a figure over the rounds. `None` if a round failed.
    pub(super) fn spread(&self, figure: Figure) -> Option<Spread> {
        Spread::from_rounds(self.values(figure))
    }

    /// Returns the spread of the server's resident memory over the rounds, in MiB.
    pub(super) fn rss_mib(&self) -> Option<Spread> {
        let mib = |bytes| count_to_f64(bytes) / 1_048_576.0;
        let rss = |round: &Option<Measurement>| Some(mib(round.as_ref()?.rss_bytes?));
        Spread::from_rounds(self.rounds.iter().map(rss))
    }

    /// Returns the sums of the counts over all rounds.
    pub(super) fn counts(&self) -> Counts {
        let measured = self.rounds.iter().flatten();
        measured.map(|measurement| measurement.counts).sum()
    }
}

impl Results {
    pub(super) fn add(
        &mut self,
        scenario: Scenario,
        server: ServerKind,
        measurement: Option<Measurement>,
    ) {
        match self.position(scenario, server) {
            Ok(at) => self.cells[at].rounds.push(measurement),
            Err(at) => {
                let rounds = vec![measurement];
                let cell = Cell {
                    scenario,
                    server,
                    rounds,
                };
                self.cells.insert(at, cell);
            }
        }
    }

    pub(super) fn cell(&self, scenario: Scenario, server: ServerKind) -> Option<&Cell> {
        let at = self.position(scenario, server).ok()?;
        self.cells.get(at)
    }

    /// Returns the position of a cell. The error is the position at which to insert the cell.
    fn position(&self, scenario: Scenario, server: ServerKind) -> Result<usize, usize> {
        self.cells
            .binary_search_by_key(&(scenario, server), Cell::key)
    }

    pub(super) fn of_scenario(&self, scenario: Scenario) -> impl Iterator<Item = &Cell> {
        self.cells
            .iter()
            .filter(move |cell| cell.scenario == scenario)
    }

    /// Divides a figure by another one, round by round, and returns the spread of the ratios. `None` if a round failed.
    pub(super) fn ratio(
        &self,
        scenario: Scenario,
        own: (ServerKind, Figure),
        other: (ServerKind, Figure),
    ) -> Option<Spread> {
        let values = |(server, figure)| Some(self.cell(scenario, server)?.values(figure));
        let pairs = values(own)?.zip(values(other)?);
        Spread::from_rounds(pairs.map(|(own, other)| Some(own? / other?)))
    }

    /// Returns the measured scenarios, in order.
    pub(super) fn scenarios(&self) -> impl Iterator<Item = Scenario> {
        let all: BTreeSet<_> = self.cells.iter().map(|cell| cell.scenario).collect();
        all.into_iter()
    }

    /// Compares the prompt tokens that each server counted with those that the first server counted, round by round.
    /// Returns the differences.
    pub(super) fn prompt_differences(&self) -> Vec<PromptDifference> {
        let mut differences = Vec::new();
        for scenario in self.scenarios() {
            let cells: Vec<_> = self.of_scenario(scenario).collect();
            let Some((first, others)) = cells.split_first() else {
                continue;
            };
            for other in others {
                let rounds = (1..).zip(first.rounds.iter().zip(&other.rounds));
                let found = rounds.filter_map(|(round, pair)| {
                    let (Some(own), Some(theirs)) = pair else {
                        return None;
                    };
                    let (own, theirs) = (own.counts.prompt_tokens, theirs.counts.prompt_tokens);
                    let text = format!(
                        "{}, round {round}: {} counted {own} prompt tokens, but {} counted {theirs}",
                        scenario.title(), first.server.title(), other.server.title()
                    );
                    let difference = count_to_f64(own.abs_diff(theirs)) / count_to_f64(own);
                    let is_large = difference > MAX_PROMPT_DIFFERENCE;
                    (own != theirs).then_some(PromptDifference { text, is_large })
                });
                differences.extend(found);
            }
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds a measurement of the scenario `LongPrompt`.
    fn add(results: &mut Results, server: ServerKind, rate: f64, prompt_tokens: u64) {
        let counts = Counts {
            prompt_tokens,
            ..Counts::default()
        };
        let measurement = Measurement::new([(Figure::PromptRate, rate)], counts);
        results.add(Scenario::LongPrompt, server, Some(measurement));
    }

    fn ratio(results: &Results) -> Option<Spread> {
        let of = |server| (server, Figure::PromptRate);
        let (own, other) = (of(ServerKind::Tokenway), of(ServerKind::LlamaCpp));
        results.ratio(Scenario::LongPrompt, own, other)
    }

    #[test]
    fn a_ratio_is_taken_within_each_round() {
        let mut results = Results::default();
        for (own, theirs) in [(10.0, 10.0), (10.0, 40.0), (50.0, 100.0)] {
            add(&mut results, ServerKind::Tokenway, own, 0);
            add(&mut results, ServerKind::LlamaCpp, theirs, 0);
        }
        let expected = Spread {
            median: 0.5,
            lowest: 0.25,
            highest: 1.0,
        };
        assert_eq!(ratio(&results), Some(expected));
    }

    #[test]
    fn a_failed_round_leaves_no_figure() {
        let mut results = Results::default();
        for server in [ServerKind::Tokenway, ServerKind::LlamaCpp] {
            add(&mut results, server, 1.0, 0);
        }
        assert!(ratio(&results).is_some());
        add(&mut results, ServerKind::Tokenway, 1.0, 0);
        results.add(Scenario::LongPrompt, ServerKind::LlamaCpp, None);
        assert_eq!(ratio(&results), None);
    }

    #[test]
    fn the_order_of_the_servers_is_that_of_their_kinds_whichever_ran_first() {
        let kinds = [ServerKind::Tokenway, ServerKind::LlamaCpp, ServerKind::Vllm];
        let mut results = Results::default();
        for server in [1, 2, 0].map(|at| kinds[at]) {
            add(&mut results, server, 1.0, 100);
        }
        results.add(Scenario::DecodeOne, ServerKind::Vllm, None);
        for (server, prompt_tokens) in kinds.into_iter().zip([200, 201, 200]) {
            add(&mut results, server, 2.0, prompt_tokens);
        }
        let of = |scenario| results.of_scenario(scenario).map(|cell| cell.server);
        assert!(of(Scenario::LongPrompt).eq(kinds));
        assert!(of(Scenario::DecodeOne).eq([ServerKind::Vllm]));
        let differences = results.prompt_differences();
        let texts: Vec<_> = differences.iter().map(|it| it.text.as_str()).collect();
        let text = "a long prompt, round 2: Tokenway counted 200 prompt tokens, but llama.cpp's server counted 201";
        assert_eq!(texts, [text]);
    }

    #[test]
    fn prompts_with_other_numbers_of_tokens_are_reported() {
        let differences = |own, theirs| {
            let mut results = Results::default();
            add(&mut results, ServerKind::Tokenway, 1.0, own);
            add(&mut results, ServerKind::LlamaCpp, 1.0, theirs);
            let found = results.prompt_differences().into_iter();
            found.map(|it| (it.text, it.is_large)).collect::<Vec<_>>()
        };
        assert_eq!(differences(1_350, 1_350), []);
        let text = "a long prompt, round 1: Tokenway counted 1350 prompt tokens, but llama.cpp's server counted 1351";
        assert_eq!(differences(1_350, 1_351), [(text.to_owned(), false)]);
        assert!(differences(1_350, 1_300)[0].1);
    }
}
