//! The list of targets. Each is of a lane under a load, most of them beside what its floor does under the
//! same one.

use super::Bound;
use crate::overhead::lane::Lane;
use crate::overhead::results::{Place, Round};
use crate::overhead::scale::Scale;
use crate::overhead::scenario::{Scenario, Size};

/// A target before it is looked at.
pub(super) struct Wanted {
    pub(super) what: String,
    pub(super) value: Value,
    pub(super) place: Place,
    /// What it is compared with.
    pub(super) beside: Option<Place>,
    pub(super) bound: Bound,
    pub(super) limit: f64,
}

/// What is looked at.
#[derive(Clone, Copy)]
pub(super) enum Value {
    /// Tokens a second, as a share of the other's.
    Throughput,
    /// Requests a second, as a share of the other's.
    Requests,
    /// Processor time for each token, as a multiple of the other's.
    Cpu,
    /// What is added to the other's one-way latency at the median.
    AddedP50,
    /// What is added to the other's one-way latency at the 99th percentile.
    AddedP99,
    /// What is added to the other's time to the first token at the median.
    AddedTtft,
    /// One-way latency at the 99th percentile.
    P99,
    /// How many streams were no good.
    Faults,
    /// What the server's memory grows by for each stream.
    Memory,
}

pub(super) const PACED: Scenario = Scenario::Paced(64);
pub(super) const ONE: Scenario = Scenario::Paced(1);
pub(super) const FULL: Scenario = Scenario::Full(64);

/// A lane and its floor.
type Pair = (Lane, Lane);

const HTTP: Pair = (Lane::Ndjson, Lane::BareAxum);
const GRPC: Pair = (Lane::Grpc, Lane::BareTonic);
const TWO: Pair = (Lane::TwoTcp, Lane::BareAxum);
/// A worker in a process of its own, beside one on a thread.
const CHILD: Pair = (Lane::Child, Lane::Ndjson);

/// How much more a token may cost with ten times the streams and as many tokens a second. That it costs
/// more at all may be chance.
const GROWTH: f64 = 1.1;

/// The targets of every run; which of them it can judge depends on what it measures.
pub(super) fn wanted() -> Vec<Wanted> {
    use Scenario::{OpenLoop, Short};
    use Value::{AddedP50, AddedP99, AddedTtft, Cpu, Requests, Throughput};
    let paced_cpu = "HTTP: CPU per token of bare axum, paced";
    let full_cpu = "HTTP: CPU per token of bare axum, full speed";
    let child_paced_cpu = "worker process: CPU per token of a thread's, paced";
    let child_full_cpu = "worker process: CPU per token of a thread's, full speed";
    let two = "gateway | engine: tokens/s of bare axum";
    let http_ttft = "HTTP: added to TTFT at p50, 1,000 requests/s";
    let grpc_ttft = "gRPC: added to TTFT at p50, 1,000 requests/s";
    let beside_floors = [
        of("HTTP: tokens/s of bare axum", FULL, HTTP, Throughput).at_least(0.65),
        of("gRPC: tokens/s of bare tonic", FULL, GRPC, Throughput).at_least(0.85),
        of(two, FULL, TWO, Throughput).at_least(0.55),
        of("HTTP: added at p50, 64 streams", PACED, HTTP, AddedP50).at_most(15.0),
        of("HTTP: added at p99, 64 streams", PACED, HTTP, AddedP99).at_most(60.0),
        of("gRPC: added at p50, 64 streams", PACED, GRPC, AddedP50).at_most(10.0),
        of("gRPC: added at p99, 64 streams", PACED, GRPC, AddedP99).at_most(40.0),
        of("HTTP: added at p50, 1 stream", ONE, HTTP, AddedP50).at_most(25.0),
        of(paced_cpu, PACED, HTTP, Cpu).at_most(1.25),
        of(full_cpu, FULL, HTTP, Cpu).at_most(1.8),
        of(child_paced_cpu, PACED, CHILD, Cpu).at_most(1.5),
        of(child_full_cpu, FULL, CHILD, Cpu).at_most(1.5),
        of("HTTP: requests/s of bare axum", Short, HTTP, Requests).at_least(0.5),
        of(http_ttft, OpenLoop, HTTP, AddedTtft).at_most(150.0),
        of("gRPC: requests/s of bare tonic", Short, GRPC, Requests).at_least(0.5),
        of(grpc_ttft, OpenLoop, GRPC, AddedTtft).at_most(150.0),
    ];
    beside_floors.into_iter().chain(of_scale()).collect()
}

/// What must hold with thousands of streams.
fn of_scale() -> Vec<Wanted> {
    use Value::{Cpu, Faults, Memory, P99};
    let [many, few, slow, queued] = Scale::all(Size::WHOLE.crowd);
    let mut all = Vec::new();
    for (door, lane) in [("HTTP", Lane::Ndjson), ("gRPC", Lane::Grpc)] {
        let of = |what: &str, scale: Scale| (format!("{door}: {what}, {}", scale.title()), scale);
        let growth = format!("{door}: CPU per token of that of a tenth as many streams");
        all.extend([
            alone(of("p99", many), lane, P99, 50.0),
            alone(of("faults", many), lane, Faults, 0.0),
            alone(of("memory per stream", many), lane, Memory, 40.0),
            Wanted {
                beside: Some(Place(Scenario::Scale(few), lane)),
                ..alone((growth, many), lane, Cpu, GROWTH)
            },
            alone(of("faults", slow), lane, Faults, 0.0),
            alone(of("memory per stream", slow), lane, Memory, 40.0),
        ]);
    }
    let waiting = format!("gRPC: memory for each of {}", queued.title());
    all.push(alone((waiting, queued), Lane::Grpc, Memory, 8.0));
    all
}

/// A lane by itself, at most so much.
fn alone((what, scale): (String, Scale), lane: Lane, value: Value, limit: f64) -> Wanted {
    Wanted {
        what,
        value,
        place: Place(Scenario::Scale(scale), lane),
        beside: None,
        bound: Bound::AtMost,
        limit,
    }
}

/// A lane beside its floor, under the same load.
fn of(what: &str, scenario: Scenario, (lane, floor): Pair, value: Value) -> Wanted {
    Wanted {
        what: what.to_owned(),
        value,
        place: Place(scenario, lane),
        beside: Some(Place(scenario, floor)),
        bound: Bound::AtLeast,
        limit: 0.0,
    }
}

impl Wanted {
    fn at_least(self, limit: f64) -> Self {
        Self {
            bound: Bound::AtLeast,
            limit,
            ..self
        }
    }

    fn at_most(self, limit: f64) -> Self {
        Self {
            bound: Bound::AtMost,
            limit,
            ..self
        }
    }
}

impl Value {
    pub(super) fn of(self, round: &Round) -> Option<f64> {
        match self {
            Self::Throughput => Some(round.tokens_per_second),
            Self::Requests => Some(round.requests_per_second),
            Self::Cpu => round.cpu_us_per_token,
            Self::AddedP50 => Some(round.one_way_p50_us),
            Self::AddedP99 => Some(round.one_way_p99_us),
            Self::AddedTtft => Some(round.ttft_p50_us),
            Self::P99 => Some(round.one_way_p99_us / 1e3),
            Self::Faults => Some(f64::from(round.faults)),
            Self::Memory => round.rss_per_stream.map(|bytes| bytes / 1024.0),
        }
    }

    /// What it is beside another's.
    pub(super) fn compare(self, value: f64, other: f64) -> f64 {
        match self {
            Self::Throughput | Self::Requests | Self::Cpu => value / other,
            Self::AddedP50
            | Self::AddedP99
            | Self::AddedTtft
            | Self::P99
            | Self::Faults
            | Self::Memory => value - other,
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Throughput | Self::Requests | Self::Cpu => "×",
            Self::AddedP50 | Self::AddedP99 | Self::AddedTtft => "µs",
            Self::P99 => "ms",
            Self::Faults => "",
            Self::Memory => "KiB",
        }
    }
}

/// Where a quick run must have measured for each of its targets to be judged.
#[cfg(test)]
pub(crate) fn needed() -> impl Iterator<Item = Place> {
    let places = wanted()
        .into_iter()
        .flat_map(|wanted| [Some(wanted.place), wanted.beside])
        .flatten();
    let in_wake_ups = [
        Place(PACED, Lane::TwoTcp),
        Place(PACED, Lane::BareAxum),
        Place(ONE, Lane::Mpsc),
    ];
    let places = places.filter(|Place(scenario, _)| !matches!(scenario, Scenario::Scale(_)));
    places.chain(in_wake_ups)
}
