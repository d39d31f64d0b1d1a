//! The targets of a run: what the product may take beside its floors, and whether it did.

use serde::Serialize;

use super::lane::Lane;
use super::results::{Place, Results, Round};
use super::statistics::Spread;

mod wanted;

#[cfg(test)]
pub(super) use wanted::needed;
use wanted::{FULL, ONE, PACED, wanted};

/// One target and what came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    /// What is limited.
    pub(crate) target: String,
    /// The median of the rounds.
    pub(crate) value: f64,
    /// How far the rounds lie apart.
    pub(crate) spread: Spread,
    /// What the value may be at most, or must be at least.
    pub(crate) limit: f64,
    /// Which of the two.
    pub(crate) bound: Bound,
    /// `×` is a ratio, `%` a share.
    pub(crate) unit: &'static str,
    pub(crate) pass: bool,
}

/// Which side of its limit a value must be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    AtLeast,
    AtMost,
}

impl Bound {
    /// The sign between a value and its limit.
    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::AtLeast => "≥",
            Self::AtMost => "≤",
        }
    }

    fn holds(self, value: f64, limit: f64) -> bool {
        match self {
            Self::AtLeast => value >= limit,
            Self::AtMost => value <= limit,
        }
    }
}

/// Judges the targets that the run has measured.
pub(super) fn judge(results: &Results) -> Vec<Target> {
    let judged = wanted().into_iter().filter_map(|wanted| {
        let value = wanted.value;
        let spread = match wanted.beside {
            None => results.cell(wanted.place)?.spread(|round| value.of(round)),
            Some(beside) => results.compare(
                (wanted.place, beside),
                |round| value.of(round),
                |mine, its| value.compare(mine, its),
            ),
        };
        let limit = (wanted.bound, wanted.limit);
        Some(judged(wanted.what, spread?, limit, value.unit()))
    });
    judged
        .chain(in_wake_ups(results))
        .chain(timing(results))
        .collect()
}

/// What a second process adds at the median, measured by what waking a thread costs on this machine in
/// this run: a token takes two more wake-ups on its way. A wake-up is what the channel takes with one
/// stream, whose reader sleeps before each token; with 64 of them it is mostly awake.
fn in_wake_ups(results: &Results) -> Option<Target> {
    let one_way = |round: &Round| Some(round.one_way_p50_us);
    let wake_up = results
        .cell(Place(ONE, Lane::Mpsc))?
        .spread(one_way)?
        .median;
    let added = results.compare(
        (Place(PACED, Lane::TwoTcp), Place(PACED, Lane::BareAxum)),
        one_way,
        |two, floor| (two - floor) / wake_up,
    );
    let what = "gateway | engine: added at p50, in channel wake-ups".to_owned();
    Some(judged(what, added?, (Bound::AtMost, 2.0), "×"))
}

/// What it takes to time the stages of tokens, of all that they cost.
fn timing(results: &Results) -> impl Iterator<Item = Target> {
    let paced = results.timing_share(Place(PACED, Lane::Ndjson), |cost| cost.lone_ns);
    let full = results.timing_share(Place(FULL, Lane::Ndjson), |cost| cost.batched_ns);
    let shares = [("paced", paced), ("full speed", full)].into_iter();
    shares.filter_map(|(load, share)| {
        let what = format!("HTTP: timing of stages, of CPU per token, {load}");
        Some(judged(what, share?, (Bound::AtMost, 2.0), "%"))
    })
}

fn judged(
    target: String,
    spread: Spread,
    (bound, limit): (Bound, f64),
    unit: &'static str,
) -> Target {
    let value = spread.median;
    Target {
        target,
        value,
        spread,
        limit,
        bound,
        unit,
        pass: bound.holds(value, limit),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scale::Scale;
    use super::super::scenario::{Scenario, Size};
    use super::super::timing::TimingCost;
    use super::*;
    use crate::load::Times;

    /// The targets of a run with these rounds.
    fn judged<const N: usize>(rounds: [(Scenario, Lane, Round); N]) -> Vec<(String, f64, bool)> {
        let mut results = Results::default();
        for (scenario, lane, round) in rounds {
            results.add(Place(scenario, lane), round, &Times::new());
        }
        let targets = judge(&results).into_iter();
        targets
            .map(|target| (target.target, target.value, target.pass))
            .collect()
    }

    #[test]
    fn a_ratio_and_a_difference_are_taken_within_each_round_and_their_median_is_judged() {
        let short = |requests_per_second| Round {
            requests_per_second,
            ..Round::default()
        };
        let floors =
            [10.0, 20.0, 40.0].map(|value| (Scenario::Short, Lane::BareAxum, short(value)));
        let [a, b, c] = floors;
        let lanes = [9.0, 8.0, 8.0].map(|value| (Scenario::Short, Lane::Ndjson, short(value)));
        let [d, e, f] = lanes;
        let what = "HTTP: requests/s of bare axum".to_owned();
        assert_eq!(judged([a, b, c, d, e, f]), [(what, 0.4, false)]);
        let ttft = |ttft_p50_us| Round {
            ttft_p50_us,
            ..Round::default()
        };
        let loaded = Scenario::OpenLoop;
        let what = "gRPC: added to TTFT at p50, 1,000 requests/s".to_owned();
        assert_eq!(
            judged([
                (loaded, Lane::BareTonic, ttft(100.0)),
                (loaded, Lane::Grpc, ttft(250.0)),
            ]),
            [(what, 150.0, true)]
        );
    }

    #[test]
    fn thousands_of_streams_are_judged_by_themselves_and_by_the_few_with_as_many_tokens() {
        let [many, few, slow, queued] = Scale::all(Size::WHOLE.crowd).map(Scenario::Scale);
        let round = Round {
            one_way_p99_us: 50_100.0,
            cpu_us_per_token: Some(11.0),
            rss_per_stream: Some(40.0 * 1024.0),
            ..Round::default()
        };
        let fewer = Round {
            cpu_us_per_token: Some(10.5),
            faults: 1,
            ..round.clone()
        };
        let verdicts = judged([
            (many, Lane::Grpc, round.clone()),
            (few, Lane::Grpc, fewer.clone()),
            (slow, Lane::Grpc, fewer),
            (queued, Lane::Grpc, round),
        ]);
        let failed: Vec<_> = verdicts
            .iter()
            .filter(|(_, _, pass)| !pass)
            .map(|(what, value, _)| (what.as_str(), *value))
            .collect();
        assert_eq!(
            failed,
            [
                ("gRPC: p99, 5000 streams × 20 tokens/s", 50.1),
                ("gRPC: faults, 10000 streams × 1 token in 2 s", 1.0),
                ("gRPC: memory for each of 4000 queued requests", 40.0),
            ]
        );
        assert_eq!(verdicts.len(), 7);
    }

    #[test]
    fn the_timing_of_stages_is_judged_by_its_share_of_what_a_token_costs() {
        let mut results = Results::default();
        results.add_timing(TimingCost {
            lone_ns: 250.0,
            batched_ns: 5.0,
        });
        for (scenario, cpu) in [(Scenario::Paced(64), 25.0), (Scenario::Full(64), 0.2)] {
            let round = Round {
                cpu_us_per_token: Some(cpu),
                ..Round::default()
            };
            results.add(Place(scenario, Lane::Ndjson), round, &Times::new());
        }
        let shares: Vec<_> = judge(&results)
            .iter()
            .map(|target| (target.value, target.unit, target.pass))
            .collect();
        assert_eq!(shares, [(1.0, "%", true), (2.5, "%", false)]);
    }

    #[test]
    fn what_was_not_measured_is_not_judged() {
        let alone = (Scenario::Short, Lane::Ndjson, Round::default());
        assert_eq!(judged([alone]), []);
        let [small, ..] = Scale::all(Size::QUICK.crowd).map(Scenario::Scale);
        assert_eq!(judged([(small, Lane::Ndjson, Round::default())]), []);
    }
}
