//! The list of targets. Each is of a path under a load, most of them beside the path's floor under the same
//! load.

use super::Bound;
use crate::overhead::path::MeasuredPath;
use crate::overhead::results::{CellKey, Round};
use crate::overhead::scale::Scale;
use crate::overhead::scenario::{Scenario, Size};

/// A target before it is judged.
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) value: Value,
    pub(super) key: CellKey,
    /// Cell with which it is compared.
    pub(super) beside: Option<CellKey>,
    pub(super) bound: Bound,
    pub(super) limit: f64,
}

/// Value that is judged.
#[derive(Clone, Copy)]
pub(super) enum Value {
    /// Tokens a second, as a share of the other cell's.
    Throughput,
    /// Requests a second, as a share of the other cell's.
    Requests,
    /// Processor time for each token, as a multiple of the other cell's.
    Cpu,
    /// Difference of the median one-way latencies.
    AddedP50,
    /// Difference of the one-way latencies at the 99th percentile.
    AddedP99,
    /// Difference of the median times to the first token.
    AddedTtft,
    /// One-way latency at the 99th percentile.
    P99,
    /// Number of streams that failed.
    Faults,
    /// Growth of the server's memory for each stream.
    Memory,
}

pub(super) const PACED: Scenario = Scenario::Paced(64);
pub(super) const ONE: Scenario = Scenario::Paced(1);
pub(super) const FULL: Scenario = Scenario::Full(64);

/// A path, and the one with which it is compared.
#[derive(Clone, Copy)]
struct Pair {
    path: MeasuredPath,
    beside: MeasuredPath,
}

const HTTP: Pair = Pair {
    path: MeasuredPath::Ndjson,
    beside: MeasuredPath::BareAxum,
};
const GRPC: Pair = Pair {
    path: MeasuredPath::Grpc,
    beside: MeasuredPath::BareTonic,
};
const TWO: Pair = Pair {
    path: MeasuredPath::TwoTcp,
    beside: MeasuredPath::BareAxum,
};
/// A worker in a process of its own, beside one on a thread.
const CHILD: Pair = Pair {
    path: MeasuredPath::Child,
    beside: MeasuredPath::Ndjson,
};

/// Factor by which a token may cost more with ten times the streams and as many tokens a second.
const GROWTH: f64 = 1.1;

/// Targets of every run. A run judges those whose cells it measures.
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

/// Targets with thousands of streams.
fn of_scale() -> Vec<Wanted> {
    use Value::{Cpu, Faults, Memory, P99};
    let [many, few, slow, queued] = Scale::all(Size::WHOLE.crowd);
    let mut all = Vec::new();
    for (api, path) in [("HTTP", MeasuredPath::Ndjson), ("gRPC", MeasuredPath::Grpc)] {
        let key = |scale| CellKey::new(Scenario::Scale(scale), path);
        let of = |name: &str, scale: Scale, value, limit| {
            alone(
                format!("{api}: {name}, {}", scale.title()),
                key(scale),
                value,
            )
            .at_most(limit)
        };
        let growth = format!("{api}: CPU per token of that of a tenth as many streams");
        all.extend([
            of("p99", many, P99, 50.0),
            of("faults", many, Faults, 0.0),
            of("memory per stream", many, Memory, 40.0),
            Wanted {
                beside: Some(key(few)),
                ..alone(growth, key(many), Cpu).at_most(GROWTH)
            },
            of("faults", slow, Faults, 0.0),
            of("memory per stream", slow, Memory, 40.0),
        ]);
    }
    let waiting = format!("gRPC: memory for each of {}", queued.title());
    let key = CellKey::new(Scenario::Scale(queued), MeasuredPath::Grpc);
    all.push(alone(waiting, key, Memory).at_most(8.0));
    all
}

/// A path by itself.
fn alone(name: String, key: CellKey, value: Value) -> Wanted {
    Wanted {
        name,
        value,
        key,
        beside: None,
        bound: Bound::AtMost,
        limit: 0.0,
    }
}

/// A path beside another under the same load.
fn of(name: &str, scenario: Scenario, pair: Pair, value: Value) -> Wanted {
    let key = |path| CellKey::new(scenario, path);
    Wanted {
        beside: Some(key(pair.beside)),
        ..alone(name.to_owned(), key(pair.path), value)
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

    /// Ratio to the other cell's value, or difference from it.
    pub(super) fn compare(self, value: f64, other: f64) -> f64 {
        if self.unit() == "×" {
            value / other
        } else {
            value - other
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

/// Cells that a quick run must measure to judge each of its targets.
#[cfg(test)]
pub(crate) fn needed() -> impl Iterator<Item = CellKey> {
    let keys = wanted()
        .into_iter()
        .flat_map(|wanted| [Some(wanted.key), wanted.beside])
        .flatten();
    let in_wake_ups = [
        (PACED, MeasuredPath::TwoTcp),
        (PACED, MeasuredPath::BareAxum),
        (ONE, MeasuredPath::Mpsc),
    ];
    let in_wake_ups = in_wake_ups.map(|(scenario, path)| CellKey::new(scenario, path));
    let keys = keys.filter(|key| !matches!(key.scenario, Scenario::Scale(_)));
    keys.chain(in_wake_ups)
}
