//! The list of targets. Each is of a path under a load, most of them beside the path's floor under the same
//! load.

use std::collections::BTreeSet;

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

/// Factor by which a token may cost more with ten times the streams and as many tokens a second.
const GROWTH: f64 = 1.1;

/// Targets of every run. A run judges those whose cells it measures.
pub(super) fn wanted() -> Vec<Wanted> {
    use MeasuredPath::{Child, Grpc, Ndjson, TwoTcp, Unlogged};
    use Scenario::{OpenLoop, Short};
    use Value::{AddedP50, AddedP99, AddedTtft, Cpu, Requests, Throughput};
    let paced_cpu = "HTTP: CPU per token of bare axum, paced";
    let full_cpu = "HTTP: CPU per token of bare axum, full speed";
    let two = "gateway | engine: tokens/s of bare axum";
    let http_ttft = "HTTP: added to TTFT at p50, 1,000 requests/s";
    let grpc_ttft = "gRPC: added to TTFT at p50, 1,000 requests/s";
    let child = |name, load| beside(name, load, Child, Cpu).than(Ndjson).limit(1.5);
    let logged = |name, load| beside(name, load, Ndjson, Cpu).than(Unlogged).limit(1.02);
    let beside_others = [
        beside("HTTP: tokens/s of bare axum", FULL, Ndjson, Throughput).limit(0.65),
        beside("gRPC: tokens/s of bare tonic", FULL, Grpc, Throughput).limit(0.85),
        beside(two, FULL, TwoTcp, Throughput).limit(0.55),
        beside("HTTP: added at p50, 64 streams", PACED, Ndjson, AddedP50).limit(15.0),
        beside("HTTP: added at p99, 64 streams", PACED, Ndjson, AddedP99).limit(60.0),
        beside("gRPC: added at p50, 64 streams", PACED, Grpc, AddedP50).limit(10.0),
        beside("gRPC: added at p99, 64 streams", PACED, Grpc, AddedP99).limit(40.0),
        beside("HTTP: added at p50, 1 stream", ONE, Ndjson, AddedP50).limit(25.0),
        beside(paced_cpu, PACED, Ndjson, Cpu).limit(1.25),
        beside(full_cpu, FULL, Ndjson, Cpu).limit(1.8),
        child("worker process: CPU per token of a thread's, paced", PACED),
        child(
            "worker process: CPU per token of a thread's, full speed",
            FULL,
        ),
        logged("HTTP: CPU per token of that with the log off, paced", PACED),
        logged(
            "HTTP: CPU per token of that with the log off, full speed",
            FULL,
        ),
        beside("HTTP: requests/s of bare axum", Short, Ndjson, Requests).limit(0.5),
        beside(http_ttft, OpenLoop, Ndjson, AddedTtft).limit(150.0),
        beside("gRPC: requests/s of bare tonic", Short, Grpc, Requests).limit(0.5),
        beside(grpc_ttft, OpenLoop, Grpc, AddedTtft).limit(150.0),
    ];
    beside_others.into_iter().chain(of_scale()).collect()
}

/// Targets with thousands of streams.
fn of_scale() -> Vec<Wanted> {
    use Value::{Cpu, Faults, Memory, P99};
    let [many, few, slow, queued] = Scale::all(Size::WHOLE.crowd);
    let mut all = Vec::new();
    for (api, path) in [("HTTP", MeasuredPath::Ndjson), ("gRPC", MeasuredPath::Grpc)] {
        let key = |scale| CellKey::new(Scenario::Scale(scale), path);
        let of = |name: &str, scale: Scale, value| {
            let name = format!("{api}: {name}, {}", scale.title());
            alone(name, key(scale), value)
        };
        let growth = format!("{api}: CPU per token of that of a tenth as many streams");
        all.extend([
            of("p99", many, P99).limit(50.0),
            of("faults", many, Faults).limit(0.0),
            of("memory per stream", many, Memory).limit(40.0),
            Wanted {
                beside: Some(key(few)),
                ..alone(growth, key(many), Cpu).limit(GROWTH)
            },
            of("faults", slow, Faults).limit(0.0),
            of("memory per stream", slow, Memory).limit(40.0),
        ]);
    }
    let waiting = format!("gRPC: memory for each of {}", queued.title());
    let key = CellKey::new(Scenario::Scale(queued), MeasuredPath::Grpc);
    all.push(alone(waiting, key, Memory).limit(8.0));
    all
}

/// A path by itself.
fn alone(name: String, key: CellKey, value: Value) -> Wanted {
    Wanted {
        name,
        value,
        key,
        beside: None,
        limit: 0.0,
    }
}

/// A path beside its floor under the same load.
fn beside(name: &str, scenario: Scenario, path: MeasuredPath, value: Value) -> Wanted {
    let key = |path| CellKey::new(scenario, path);
    Wanted {
        beside: path.floor().map(key),
        ..alone(name.to_owned(), key(path), value)
    }
}

impl Wanted {
    /// Compares with this path under the same load.
    fn than(self, other: MeasuredPath) -> Self {
        let beside = Some(CellKey::new(self.key.scenario, other));
        Self { beside, ..self }
    }

    fn limit(self, limit: f64) -> Self {
        Self { limit, ..self }
    }
}

impl Value {
    pub(super) fn of(self, round: &Round) -> Option<f64> {
        match self {
            Self::Throughput => Some(round.rates.tokens_per_second),
            Self::Requests => Some(round.rates.requests_per_second),
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

    /// Side of the limit on which it must be.
    pub(super) fn bound(self) -> Bound {
        match self {
            Self::Throughput | Self::Requests => Bound::AtLeast,
            Self::Cpu | Self::AddedP50 | Self::AddedP99 | Self::AddedTtft => Bound::AtMost,
            Self::P99 | Self::Faults | Self::Memory => Bound::AtMost,
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

/// Paths that a run must measure under a load to judge its targets.
pub(crate) fn needed(scenario: Scenario) -> Vec<MeasuredPath> {
    let wanted = wanted().into_iter();
    let keys = wanted.flat_map(|wanted| [Some(wanted.key), wanted.beside]);
    // The target in wake-ups.
    let two = CellKey::new(PACED, MeasuredPath::TwoTcp);
    let keys = keys
        .flatten()
        .chain([two, CellKey::new(ONE, MeasuredPath::Mpsc)]);
    let paths = keys
        .filter(|key| key.scenario == scenario)
        .map(|key| key.path);
    paths.collect::<BTreeSet<_>>().into_iter().collect()
}
