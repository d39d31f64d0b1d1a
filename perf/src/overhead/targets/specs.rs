//! The list of targets. Each target limits a value of a path under a load. Most values are compared with those of the
//! path's floor under the same load.

use std::collections::BTreeSet;

use crate::overhead::path::{MeasuredPath, Protection};
use crate::overhead::results::{CellKey, Round};
use crate::overhead::scale::Scale;
use crate::overhead::scenario::{RunSize, Scenario};
use crate::target::Bound;

/// Definition of a target, before it is judged.
pub(super) struct TargetSpec {
    pub(super) name: String,
    pub(super) value: TargetValue,
    pub(super) key: CellKey,
    /// Cell with which the value is compared. `None` if the value is not compared with another.
    pub(super) beside: Option<CellKey>,
    pub(super) limit: f64,
}

/// Value that a target limits.
#[derive(Clone, Copy)]
pub(super) enum TargetValue {
    /// Tokens per second, divided by those of the cell in `beside`.
    Throughput,
    /// Requests per second, divided by those of the cell in `beside`.
    Requests,
    /// Processor time per token, divided by that of the cell in `beside`.
    Cpu,
    /// Median one-way latency, minus that of the cell in `beside`.
    AddedP50,
    /// One-way latency at the 99th percentile, minus that of the cell in `beside`.
    AddedP99,
    /// Median time to the first token, minus that of the cell in `beside`.
    AddedTtft,
    /// One-way latency at the 99th percentile.
    P99,
    /// Number of streams that failed.
    Faults,
    /// Growth of the server's memory per stream or queued request.
    Memory,
}

pub(super) const PACED: Scenario = Scenario::Paced(64);
pub(super) const ONE_PACED_STREAM: Scenario = Scenario::Paced(1);
pub(super) const FULL: Scenario = Scenario::Full(64);
/// Limit of the CPU time per token relative to that with a tenth as many streams and the same total token rate.
const MAX_COST_GROWTH: f64 = 1.1;

/// Returns all targets. A run judges the targets whose cells it measures.
pub(super) fn target_specs() -> Vec<TargetSpec> {
    use MeasuredPath::{Child, Grpc, Ndjson, TwoTcp, Unlogged};
    use Scenario::{OpenLoop, Short};
    use TargetValue::{AddedP50, AddedP99, AddedTtft, Cpu, Requests, Throughput};
    let floors = [
        ("", FULL, Ndjson, Throughput, 0.65),
        ("", FULL, Grpc, Throughput, 0.85),
        ("", FULL, TwoTcp, Throughput, 0.55),
        (", 64 streams", PACED, Ndjson, AddedP50, 15.0),
        (", 64 streams", PACED, Ndjson, AddedP99, 60.0),
        (", 64 streams", PACED, Grpc, AddedP50, 10.0),
        (", 64 streams", PACED, Grpc, AddedP99, 40.0),
        (", 1 stream", ONE_PACED_STREAM, Ndjson, AddedP50, 25.0),
        (", paced", PACED, Ndjson, Cpu, 1.25),
        (", full speed", FULL, Ndjson, Cpu, 1.8),
        ("", Short, Ndjson, Requests, 0.5),
        (", 1,000 requests/s", OpenLoop, Ndjson, AddedTtft, 150.0),
        ("", Short, Grpc, Requests, 0.5),
        (", 1,000 requests/s", OpenLoop, Grpc, AddedTtft, 150.0),
    ];
    let floors = floors
        .into_iter()
        .map(|(load, scenario, path, value, limit)| {
            let floor = match (value.unit(), path.floor()) {
                ("×", Some(floor)) => format!(" {}", floor.title()),
                _ => String::new(),
            };
            let api = if path == Grpc {
                "gRPC"
            } else if path == TwoTcp {
                "gateway | engine"
            } else {
                "HTTP"
            };
            let name = format!("{api}: {}{floor}{load}", value.title());
            relative_target(&name, scenario, path, value).with_limit(limit)
        });
    let own_paths = [(PACED, "paced"), (FULL, "full speed")];
    let own_paths = own_paths.into_iter().flat_map(|(load, speed)| {
        let thread = format!("worker process: {} a worker thread, {speed}", Cpu.title());
        let unlogged = format!("HTTP: {} the log off, {speed}", Cpu.title());
        let thread = relative_target(&thread, load, Child, Cpu).relative_to(Ndjson);
        let unlogged = relative_target(&unlogged, load, Ndjson, Cpu).relative_to(Unlogged);
        [thread.with_limit(1.5), unlogged.with_limit(1.02)]
    });
    let all = floors.chain(own_paths).chain(protection_targets());
    all.chain(scale_targets()).collect()
}

/// Returns the targets of keys, limits and TLS, relative to the same API without them.
fn protection_targets() -> impl Iterator<Item = TargetSpec> {
    use MeasuredPath::{Grpc, KeysGrpc, KeysNdjson, Ndjson, TlsGrpc, TlsNdjson};
    let paths = [
        ("HTTP", "keys", KeysNdjson, Ndjson),
        ("gRPC", "keys", KeysGrpc, Grpc),
        ("HTTP", "keys and TLS", TlsNdjson, Ndjson),
        ("gRPC", "keys and TLS", TlsGrpc, Grpc),
    ];
    paths.into_iter().flat_map(|(api, on, path, off)| {
        let target = |load, speed, value: TargetValue, limit| {
            let of = match value.unit() {
                "×" => " no keys",
                _ => "",
            };
            let name = format!("{api}, {on}: {}{of}{speed}", value.title());
            relative_target(&name, load, path, value)
                .relative_to(off)
                .with_limit(limit)
        };
        let ttft = TargetValue::AddedTtft;
        [
            target(PACED, ", paced", TargetValue::Cpu, 1.05),
            target(FULL, ", full speed", TargetValue::Cpu, 1.05),
            target(Scenario::OpenLoop, ", 1,000 requests/s", ttft, 30.0),
        ]
    })
}

fn scale_targets() -> Vec<TargetSpec> {
    use TargetValue::{Cpu, Faults, Memory, P99};
    let [many, few, slow, queued] = Scale::all(RunSize::WHOLE.crowd);
    let mut all = Vec::new();
    for (api, path) in [("HTTP", MeasuredPath::Ndjson), ("gRPC", MeasuredPath::Grpc)] {
        let key = |scale| CellKey::new(Scenario::Scale(scale), path);
        let of = |name: &str, scale: Scale, value| {
            let name = format!("{api}: {name}, {}", scale.title());
            absolute_target(name, key(scale), value)
        };
        let growth = format!("{api}: CPU per token, relative to a tenth as many streams");
        all.extend([
            of("p99", many, P99).with_limit(50.0),
            of("faults", many, Faults).with_limit(0.0),
            of("memory per stream", many, Memory).with_limit(40.0),
            TargetSpec {
                beside: Some(key(few)),
                ..absolute_target(growth, key(many), Cpu).with_limit(MAX_COST_GROWTH)
            },
            of("faults", slow, Faults).with_limit(0.0),
            of("memory per stream", slow, Memory).with_limit(40.0),
        ]);
    }
    let waiting = format!("gRPC: memory per queued request, {}", queued.title());
    let key = CellKey::new(Scenario::Scale(queued), MeasuredPath::Grpc);
    all.push(absolute_target(waiting, key, Memory).with_limit(8.0));
    all
}

/// Returns a target for a value of a path that is not compared with another value.
fn absolute_target(name: String, key: CellKey, value: TargetValue) -> TargetSpec {
    TargetSpec {
        name,
        value,
        key,
        beside: None,
        limit: 0.0,
    }
}

/// Returns a target for a value that is compared with the value of the path's floor under the same load.
fn relative_target(
    name: &str,
    scenario: Scenario,
    path: MeasuredPath,
    value: TargetValue,
) -> TargetSpec {
    let key = |path| CellKey::new(scenario, path);
    TargetSpec {
        beside: path.floor().map(key),
        ..absolute_target(name.to_owned(), key(path), value)
    }
}

impl TargetSpec {
    /// Compares the value with the value of this path under the same load, instead of the floor's.
    fn relative_to(self, other: MeasuredPath) -> Self {
        let beside = Some(CellKey::new(self.key.scenario, other));
        Self { beside, ..self }
    }

    fn with_limit(self, limit: f64) -> Self {
        Self { limit, ..self }
    }
}

impl TargetValue {
    /// Returns the name of the value in reports, before the name of the cell with which it is compared.
    fn title(self) -> &'static str {
        match self {
            Self::Throughput => "tokens/s relative to",
            Self::Requests => "requests/s relative to",
            Self::Cpu => "CPU per token, relative to",
            Self::AddedP50 => "latency added at p50",
            Self::AddedP99 => "latency added at p99",
            Self::AddedTtft => "TTFT added at p50",
            Self::P99 => "p99",
            Self::Faults => "faults",
            Self::Memory => "memory per stream",
        }
    }

    pub(super) fn value_in(self, round: &Round) -> Option<f64> {
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

    /// Returns the ratio of the two values, or their difference, depending on the unit.
    pub(super) fn compare(self, value: f64, other: f64) -> f64 {
        if self.unit() == "×" {
            value / other
        } else {
            value - other
        }
    }

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

/// Returns the paths that a quick run measures under a load. A quick run has all targets except those of keys and TLS,
/// which would take as long as all others together.
pub(crate) fn paths_needed(scenario: Scenario) -> Vec<MeasuredPath> {
    let wanted = target_specs().into_iter();
    let keys = wanted.flat_map(|wanted| [Some(wanted.key), wanted.beside]);
    // `wake_up_target` needs these two cells.
    let two = CellKey::new(PACED, MeasuredPath::TwoTcp);
    let keys = keys
        .flatten()
        .chain([two, CellKey::new(ONE_PACED_STREAM, MeasuredPath::Mpsc)]);
    let paths = keys
        .filter(|key| key.scenario == scenario && key.path.protection() == Protection::None)
        .map(|key| key.path);
    paths.collect::<BTreeSet<_>>().into_iter().collect()
}
