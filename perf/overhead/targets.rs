//! The targets of a run: what the product may take beside its floors, and whether it did.

use serde::Serialize;

use super::lane::Lane;
use super::results::{Results, Round};
use super::scenario::Scenario;
use super::statistics::Spread;

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
    /// `×` is a ratio.
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

/// A target before it is looked at.
struct Wanted {
    what: &'static str,
    scenario: Scenario,
    lane: Lane,
    floor: Lane,
    value: Value,
    bound: Bound,
    limit: f64,
}

/// What is compared with the floor, and how.
#[derive(Clone, Copy)]
enum Value {
    /// Tokens a second, as a share of the floor's.
    Throughput,
    /// Requests a second, as a share of the floor's.
    Requests,
    /// Processor time for each token, as a multiple of the floor's.
    Cpu,
    /// What is added to the floor's one-way latency at the median.
    AddedP50,
    /// What is added to the floor's one-way latency at the 99th percentile.
    AddedP99,
    /// What is added to the floor's time to the first token at the median.
    AddedTtft,
}

const FULL: Scenario = Scenario::Full(64);
const PACED: Scenario = Scenario::Paced(64);

/// The targets of every run; which of them it can judge depends on its lanes.
const WANTED: [Wanted; 14] = {
    use Bound::{AtLeast, AtMost};
    use Lane::{BareAxum, BareTonic, Grpc, Ndjson, TwoTcp};
    use Value::{AddedP50, AddedP99, AddedTtft, Cpu, Requests, Throughput};
    const fn wanted(
        what: &'static str,
        scenario: Scenario,
        (lane, floor): (Lane, Lane),
        value: Value,
        (bound, limit): (Bound, f64),
    ) -> Wanted {
        Wanted {
            what,
            scenario,
            lane,
            floor,
            value,
            bound,
            limit,
        }
    }
    let http = (Ndjson, BareAxum);
    let grpc = (Grpc, BareTonic);
    let two = (TwoTcp, BareAxum);
    let one = Scenario::Paced(1);
    [
        wanted(
            "HTTP: tokens/s of bare axum",
            FULL,
            http,
            Throughput,
            (AtLeast, 0.65),
        ),
        wanted(
            "gRPC: tokens/s of bare tonic",
            FULL,
            grpc,
            Throughput,
            (AtLeast, 0.85),
        ),
        wanted(
            "gateway | engine: tokens/s of bare axum",
            FULL,
            two,
            Throughput,
            (AtLeast, 0.55),
        ),
        wanted(
            "HTTP: added at p50, 64 streams",
            PACED,
            http,
            AddedP50,
            (AtMost, 15.0),
        ),
        wanted(
            "HTTP: added at p99, 64 streams",
            PACED,
            http,
            AddedP99,
            (AtMost, 60.0),
        ),
        wanted(
            "gRPC: added at p50, 64 streams",
            PACED,
            grpc,
            AddedP50,
            (AtMost, 10.0),
        ),
        wanted(
            "gRPC: added at p99, 64 streams",
            PACED,
            grpc,
            AddedP99,
            (AtMost, 40.0),
        ),
        wanted(
            "HTTP: added at p50, 1 stream",
            one,
            http,
            AddedP50,
            (AtMost, 25.0),
        ),
        wanted(
            "HTTP: CPU per token of bare axum, paced",
            PACED,
            http,
            Cpu,
            (AtMost, 1.25),
        ),
        wanted(
            "HTTP: CPU per token of bare axum, full speed",
            FULL,
            http,
            Cpu,
            (AtMost, 1.8),
        ),
        wanted(
            "HTTP: requests/s of bare axum",
            Scenario::Short,
            http,
            Requests,
            (AtLeast, 0.5),
        ),
        wanted(
            "HTTP: added to TTFT at p50, 1,000 requests/s",
            Scenario::OpenLoop,
            http,
            AddedTtft,
            (AtMost, 150.0),
        ),
        wanted(
            "gRPC: requests/s of bare tonic",
            Scenario::Short,
            grpc,
            Requests,
            (AtLeast, 0.5),
        ),
        wanted(
            "gRPC: added to TTFT at p50, 1,000 requests/s",
            Scenario::OpenLoop,
            grpc,
            AddedTtft,
            (AtMost, 150.0),
        ),
    ]
};

impl Value {
    fn of(self, round: &Round) -> Option<f64> {
        match self {
            Self::Throughput => Some(round.tokens_per_second),
            Self::Requests => Some(round.requests_per_second),
            Self::Cpu => round.cpu_us_per_token,
            Self::AddedP50 => Some(round.one_way_p50_us),
            Self::AddedP99 => Some(round.one_way_p99_us),
            Self::AddedTtft => Some(round.ttft_p50_us),
        }
    }

    fn compare(self, value: f64, floor: f64) -> f64 {
        match self {
            Self::Throughput | Self::Requests | Self::Cpu => value / floor,
            Self::AddedP50 | Self::AddedP99 | Self::AddedTtft => value - floor,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Throughput | Self::Requests | Self::Cpu => "×",
            Self::AddedP50 | Self::AddedP99 | Self::AddedTtft => "µs",
        }
    }
}

/// Which lanes must have been measured under which loads for every target to be judged.
#[cfg(test)]
pub(super) fn needed() -> impl Iterator<Item = (Scenario, Lane)> {
    let compared = WANTED.iter();
    let compared =
        compared.flat_map(|wanted| [wanted.lane, wanted.floor].map(|lane| (wanted.scenario, lane)));
    compared.chain([Lane::TwoTcp, Lane::BareAxum, Lane::Mpsc].map(|lane| (PACED, lane)))
}

/// Judges the targets that the run has measured.
pub(super) fn judge(results: &Results) -> Vec<Target> {
    let compared = WANTED.iter().filter_map(|wanted| {
        let value = wanted.value;
        let spread = results.compare(
            wanted.scenario,
            (wanted.lane, wanted.floor),
            |round| value.of(round),
            |lane, floor| value.compare(lane, floor),
        )?;
        let limit = (wanted.bound, wanted.limit);
        Some(judged(wanted.what, spread, limit, value.unit()))
    });
    compared.chain(in_wake_ups(results)).collect()
}

/// What a second process adds at the median, measured by what waking a thread costs on this machine in
/// this run: a token takes two more wake-ups on its way.
fn in_wake_ups(results: &Results) -> Option<Target> {
    let two = results.cell(PACED, Lane::TwoTcp)?.rounds.iter();
    let floor = results.cell(PACED, Lane::BareAxum)?.rounds.iter();
    let wake_up = results.cell(PACED, Lane::Mpsc)?.rounds.iter();
    let rounds = two.zip(floor).zip(wake_up);
    let values = rounds.map(|((two, floor), wake_up)| {
        (two.one_way_p50_us - floor.one_way_p50_us) / wake_up.one_way_p50_us
    });
    let what = "gateway | engine: added at p50, in channel wake-ups";
    let limit = (Bound::AtMost, 2.0);
    Some(judged(what, Spread::of(values.collect())?, limit, "×"))
}

fn judged(what: &str, spread: Spread, (bound, limit): (Bound, f64), unit: &'static str) -> Target {
    let value = spread.median;
    let pass = match bound {
        Bound::AtLeast => value >= limit,
        Bound::AtMost => value <= limit,
    };
    Target {
        target: what.to_owned(),
        value,
        spread,
        limit,
        bound,
        unit,
        pass,
    }
}
