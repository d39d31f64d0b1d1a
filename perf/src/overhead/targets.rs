//! The targets of a run: limits on the cost that Tokenway adds to its floors, and a verdict on each.

use super::path::MeasuredPath;
use super::results::{CellKey, Results, Round};
use crate::target::{Bound, TargetResult};

mod specs;

pub(super) use specs::paths_needed;
use specs::{FULL, ONE_PACED_STREAM, PACED, target_specs};

pub(super) fn judge_targets(results: &Results) -> Vec<TargetResult> {
    let judged = target_specs().into_iter().filter_map(|wanted| {
        let value = wanted.value;
        let spread = match wanted.beside {
            None => results
                .cell(wanted.key)?
                .spread(|round| value.value_in(round)),
            Some(beside) => results.compare(
                wanted.key,
                beside,
                |round| value.value_in(round),
                |own, other| value.compare(own, other),
            ),
        };
        let (bound, unit) = (value.bound(), value.unit());
        Some(TargetResult::new(
            wanted.name,
            spread?,
            bound,
            wanted.limit,
            unit,
        ))
    });
    let judged = judged.chain(wake_up_target(results));
    judged.chain(timing_targets(results)).collect()
}

/// Judges the median latency that a second process adds, in units of a thread's wake-up time, because each token wakes
/// two more threads. The wake-up time is the latency of the token channel with one stream in this run, whose reader
/// sleeps before each token.
fn wake_up_target(results: &Results) -> Option<TargetResult> {
    let one_way = |round: &Round| Some(round.one_way_p50_us);
    let paced = |path| CellKey::new(PACED, path);
    let channel = CellKey::new(ONE_PACED_STREAM, MeasuredPath::Mpsc);
    let wake_up = results.cell(channel)?.spread(one_way)?.median;
    let added = results.compare(
        paced(MeasuredPath::TwoTcp),
        paced(MeasuredPath::BareAxum),
        one_way,
        |two, floor| (two - floor) / wake_up,
    );
    let name = "gateway | engine: latency added at p50, in thread wake-ups".to_owned();
    Some(TargetResult::new(name, added?, Bound::AtMost, 2.0, "×"))
}

/// Judges the cost of timing the stages of a token, as a share of the CPU time per token.
fn timing_targets(results: &Results) -> impl Iterator<Item = TargetResult> {
    let ndjson = |scenario| CellKey::new(scenario, MeasuredPath::Ndjson);
    let paced = results.timing_share(ndjson(PACED), |cost| cost.lone_ns);
    let full = results.timing_share(ndjson(FULL), |cost| cost.batched_ns);
    let shares = [("paced", paced), ("full speed", full)].into_iter();
    shares.filter_map(|(load, share)| {
        let name = format!("HTTP: share of CPU per token for timing stages, {load}");
        Some(TargetResult::new(name, share?, Bound::AtMost, 2.0, "%"))
    })
}

#[cfg(test)]
mod tests {
    use super::super::scenario::{RunSize, Scenario};
    use super::super::timing::TimingCost;
    use super::*;
    use crate::load_stats::LatencyHistograms;

    fn add_round(results: &mut Results, scenario: Scenario, path: MeasuredPath, round: Round) {
        results.add(
            CellKey::new(scenario, path),
            round,
            &LatencyHistograms::default(),
        );
    }

    /// Returns the name, value and verdict of each target.
    fn judge_all(results: &Results) -> Vec<(String, f64, bool)> {
        let of = |target: TargetResult| (target.target, target.value, target.pass);
        judge_targets(results).into_iter().map(of).collect()
    }

    #[test]
    fn a_ratio_is_taken_within_each_round_and_its_median_is_judged() {
        let mut results = Results::default();
        let mut short = |path, requests_per_second| {
            let mut round = Round::default();
            round.rates.requests_per_second = requests_per_second;
            add_round(&mut results, Scenario::Short, path, round);
        };
        for (floor, own) in [(10.0, 9.0), (20.0, 8.0), (40.0, 8.0)] {
            short(MeasuredPath::BareAxum, floor);
            short(MeasuredPath::Ndjson, own);
        }
        let name = "HTTP: requests/s relative to bare axum".to_owned();
        assert_eq!(judge_all(&results), [(name, 0.4, false)]);
    }

    #[test]
    fn an_added_time_is_a_difference() {
        let mut results = Results::default();
        let paths = [MeasuredPath::BareTonic, MeasuredPath::Grpc];
        for (path, ttft_p50_us) in paths.into_iter().zip([100.0, 250.0]) {
            let round = Round {
                ttft_p50_us,
                ..Round::default()
            };
            add_round(&mut results, Scenario::OpenLoop, path, round);
        }
        let name = "gRPC: TTFT added at p50, 1,000 requests/s".to_owned();
        assert_eq!(judge_all(&results), [(name, 150.0, true)]);
    }

    #[test]
    fn thousands_of_streams_are_judged_alone_and_against_fewer_with_as_many_tokens() {
        let [many, few, slow, queued] = Scenario::scales(RunSize::WHOLE);
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
        let mut results = Results::default();
        add_round(&mut results, many, MeasuredPath::Grpc, round.clone());
        add_round(&mut results, few, MeasuredPath::Grpc, fewer.clone());
        add_round(&mut results, slow, MeasuredPath::Grpc, fewer);
        add_round(&mut results, queued, MeasuredPath::Grpc, round);
        let verdicts = judge_all(&results);
        let failed = verdicts.iter().filter(|(.., pass)| !pass);
        let failed = failed.map(|(name, value, _)| (name.as_str(), *value));
        let failed: Vec<_> = failed.collect();
        let expected = [
            ("gRPC: p99, 5000 streams × 20 tokens/s", 50.1),
            ("gRPC: faults, 10000 streams × 1 token in 2 s", 1.0),
            (
                "gRPC: memory per queued request, 4000 queued requests",
                40.0,
            ),
        ];
        assert_eq!(failed, expected);
        assert_eq!(verdicts.len(), 7);
    }

    #[test]
    fn the_timing_of_stages_is_judged_by_its_share_of_a_tokens_cost() {
        let mut results = Results::default();
        results.add_timing(TimingCost {
            lone_ns: 250.0,
            batched_ns: 5.0,
        });
        for (scenario, cpu) in [(PACED, 25.0), (FULL, 0.2)] {
            let round = Round {
                cpu_us_per_token: Some(cpu),
                ..Round::default()
            };
            add_round(&mut results, scenario, MeasuredPath::Ndjson, round);
        }
        let targets = judge_targets(&results).into_iter();
        let shares: Vec<_> = targets
            .map(|target| (target.value, target.unit, target.pass))
            .collect();
        assert_eq!(shares, [(1.0, "%", true), (2.5, "%", false)]);
    }

    #[test]
    fn a_value_that_was_not_measured_is_not_judged() {
        let [small, ..] = Scenario::scales(RunSize::QUICK);
        for scenario in [Scenario::Short, small] {
            let mut results = Results::default();
            let round = Round::default();
            add_round(&mut results, scenario, MeasuredPath::Ndjson, round);
            assert_eq!(judge_all(&results), []);
        }
    }
}
