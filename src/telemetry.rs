//! What an operator sees: the metrics, their names and their labels. Labels come from closed sets; no
//! prompt, completion or key is in any of them.
//!
//! The recorder belongs to a server and is not global, so that two servers in one process count
//! apart.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use metrics::{
    Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString, Unit,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use self::latency::TokenLatency;
use crate::error::Error;
use crate::output;

mod latency;
mod request;

pub use latency::{ResponseFormat, Stage, StageSummary, StageTimes};
pub use request::{CountedRequest, DeliveryContext, StreamCount};

const REQUESTS: &str = "tokenway_requests_total";
const REQUESTS_REJECTED: &str = "tokenway_requests_rejected_total";
const STREAMS: &str = "tokenway_requests_in_flight";
const LINGERING: &str = "tokenway_requests_lingering";
const CONNECTIONS: &str = "tokenway_connections_open";
const SEQUENCES: &str = "tokenway_sequences_running";
const QUEUE_DEPTH: &str = "tokenway_requests_queued";
const TOKENS: &str = "tokenway_tokens_generated_total";
const TOKENS_WASTED: &str = "tokenway_tokens_wasted_total";
const CANCELLATIONS: &str = "tokenway_cancellations_total";
const IGNORED_FIELDS: &str = "tokenway_ignored_fields_total";
const WORKERS: &str = "tokenway_workers";
const WORKERS_LOST: &str = "tokenway_workers_lost_total";
const RESUMPTIONS: &str = "tokenway_resumptions_total";
const TOKENS_REPLAYED: &str = "tokenway_tokens_replayed_total";
const RESUMPTION_GAP: &str = "tokenway_resumption_gap_seconds";
const LOG_LINES_DROPPED: &str = "tokenway_log_lines_dropped_total";

/// The upper bounds of the gaps' buckets, in seconds.
const GAPS: [f64; 10] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

const METADATA: Metadata<'static> = Metadata::new("tokenway", Level::INFO, Some("tokenway"));

/// The metrics of one server. Clones count into the same ones; every request has one.
#[derive(Clone)]
pub struct Telemetry(Arc<Metrics>);

/// The metrics that have no labels, and what those with labels are found by.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// Sequences that hold a slot of a device.
    pub sequences_running: Gauge,
    /// Requests of which no choice has begun.
    pub queue_depth: Gauge,
    /// Tokens that devices made.
    pub tokens: Counter,
    /// Tokens that devices made and nobody waited for any more.
    pub tokens_wasted: Counter,
    /// Requests whose client went away before their end.
    cancellations: Counter,
    /// Fields of requests that were unknown and ignored.
    pub ignored_fields: Counter,
    /// Workers that were lost.
    pub workers_lost: Counter,
    /// How often a choice went on elsewhere.
    pub resumptions: Counter,
    /// Tokens that workers were given to go on behind.
    pub tokens_replayed: Counter,
    /// How long a choice had waited for its next token when its worker was lost, in seconds.
    pub resumption_gap_seconds: Histogram,
    /// Lines of the process's output that nobody has taken.
    log_lines_dropped: Counter,
    token_latency: TokenLatency,
}

impl Deref for Telemetry {
    type Target = Metrics;

    fn deref(&self) -> &Metrics {
        &self.0
    }
}

/// Where a request entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Frontend {
    /// gRPC.
    Grpc,
    /// OpenAI's HTTP.
    Http,
    /// The socket by which workers dial in. No request enters there.
    Worker,
}

impl Frontend {
    /// The frontend as a metric's label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
            Self::Worker => "worker",
        }
    }
}

/// What a worker is able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkerState {
    /// It loads its model for the first time.
    Loading,
    /// It takes sequences.
    Ready,
    /// It crashed or hangs; where it is started again, it is being so.
    Lost,
    /// It could not load its model, and tries again.
    Failed,
    /// It was started too often in vain, and is not started again.
    GivenUp,
}

/// How many workers are in each state.
pub type WorkerCounts = BTreeMap<WorkerState, u32>;

impl WorkerState {
    /// Each of them.
    pub const ALL: [Self; 5] = [
        Self::Loading,
        Self::Ready,
        Self::Lost,
        Self::Failed,
        Self::GivenUp,
    ];

    /// The state as a metric's label, and at `/readyz`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Lost => "lost",
            Self::Failed => "failed",
            Self::GivenUp => "given_up",
        }
    }
}

impl Telemetry {
    /// Metrics that all begin at zero.
    #[must_use]
    pub fn new() -> Self {
        let gap = Matcher::Full(RESUMPTION_GAP.to_owned());
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(gap, &GAPS)
            .expect("there are buckets")
            .build_recorder();
        let handle = recorder.handle();
        describe(&recorder);
        let counter = |name| recorder.register_counter(&Key::from_static_name(name), &METADATA);
        let gauge = |name| recorder.register_gauge(&Key::from_static_name(name), &METADATA);
        let telemetry = Self(Arc::new(Metrics {
            sequences_running: gauge(SEQUENCES),
            queue_depth: gauge(QUEUE_DEPTH),
            tokens: counter(TOKENS),
            tokens_wasted: counter(TOKENS_WASTED),
            cancellations: counter(CANCELLATIONS),
            ignored_fields: counter(IGNORED_FIELDS),
            workers_lost: counter(WORKERS_LOST),
            resumptions: counter(RESUMPTIONS),
            tokens_replayed: counter(TOKENS_REPLAYED),
            resumption_gap_seconds: recorder
                .register_histogram(&Key::from_static_name(RESUMPTION_GAP), &METADATA),
            log_lines_dropped: counter(LOG_LINES_DROPPED),
            token_latency: TokenLatency::default(),
            recorder,
            handle,
        }));
        for frontend in [Frontend::Grpc, Frontend::Http] {
            telemetry.streams(frontend).set(0.0);
            telemetry.lingering(frontend).set(0.0);
            telemetry.connections(frontend).set(0.0);
        }
        telemetry.connections(Frontend::Worker).set(0.0);
        telemetry.sequences_running.set(0.0);
        telemetry.queue_depth.set(0.0);
        for state in WorkerState::ALL {
            telemetry.workers(state).set(0.0);
        }
        telemetry
    }

    /// Everything, in Prometheus's text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.log_lines_dropped.absolute(output::dropped_lines());
        let mut text = self.handle.render();
        self.token_latency
            .write(&mut text)
            .expect("a string takes all that is written");
        text
    }

    /// One request's times of a stage, which count into the format's.
    #[must_use]
    pub fn stage_times(&self, format: ResponseFormat, stage: Stage) -> StageTimes {
        self.token_latency.times(format, stage)
    }

    /// A request that is in flight from now on.
    #[must_use]
    pub fn track_request(&self, frontend: Frontend) -> CountedRequest {
        CountedRequest::new(self, frontend)
    }

    /// Counts a request that is refused without ever having been in flight.
    pub fn count_rejected_request(&self, frontend: Frontend, error: &Error) {
        self.request_ended(frontend, Err(error));
        self.refused(frontend, error);
    }

    /// Counts why a request was refused before anything was sent.
    pub fn refused(&self, frontend: Frontend, error: &Error) {
        self.labelled_counter(
            REQUESTS_REJECTED,
            &[("api", frontend.label()), ("reason", error.kind.row().code)],
        )
        .increment(1);
    }

    /// A connection that is counted as open until the guard is dropped.
    #[must_use]
    pub fn track_connection(&self, frontend: Frontend) -> GaugeGuard {
        GaugeGuard::new(self.connections(frontend))
    }

    /// How many workers are in this state.
    pub fn workers(&self, state: WorkerState) -> Gauge {
        self.labelled_gauge(WORKERS, &[("state", state.label())])
    }

    fn request_ended(&self, frontend: Frontend, outcome: Result<(), &Error>) {
        let outcome = outcome.map_or_else(|error| error.kind.row().code, |()| "ok");
        self.labelled_counter(REQUESTS, &[("api", frontend.label()), ("outcome", outcome)])
            .increment(1);
    }

    fn streams(&self, frontend: Frontend) -> Gauge {
        self.labelled_gauge(STREAMS, &[("api", frontend.label())])
    }

    fn lingering(&self, frontend: Frontend) -> Gauge {
        self.labelled_gauge(LINGERING, &[("api", frontend.label())])
    }

    fn connections(&self, frontend: Frontend) -> Gauge {
        self.labelled_gauge(CONNECTIONS, &[("listener", frontend.label())])
    }

    fn labelled_counter(
        &self,
        name: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Counter {
        self.recorder
            .register_counter(&key(name, labels), &METADATA)
    }

    fn labelled_gauge(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts one thing for as long as it lives.
pub struct GaugeGuard {
    gauge: Gauge,
}

impl GaugeGuard {
    /// Counts one more on a gauge.
    #[must_use]
    pub fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self { gauge }
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.gauge.decrement(1.0);
    }
}

fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
    let labels: Vec<Label> = labels
        .iter()
        .map(|(name, value)| Label::from_static_parts(name, value))
        .collect();
    Key::from_parts(name, labels)
}

fn describe(recorder: &PrometheusRecorder) {
    let counter = |name: &'static str, text: &'static str| {
        recorder.describe_counter(name.into(), Some(Unit::Count), SharedString::from(text));
    };
    let gauge = |name: &'static str, text: &'static str| {
        recorder.describe_gauge(name.into(), Some(Unit::Count), SharedString::from(text));
    };
    counter(
        REQUESTS,
        "Requests that have ended, by the frontend they entered and how they ended.",
    );
    counter(
        REQUESTS_REJECTED,
        "Requests refused before anything was sent, by frontend and reason.",
    );
    gauge(
        STREAMS,
        "Requests that have not ended, by frontend: HTTP's from their arrival, gRPC's from their admission.",
    );
    gauge(
        LINGERING,
        "Requests that have ended as slow_reader and whose client may still read that, by frontend: at most for \
         the write time-out. They are not in flight.",
    );
    gauge(CONNECTIONS, "Open connections, by frontend.");
    gauge(SEQUENCES, "Sequences that hold a slot of a device.");
    gauge(QUEUE_DEPTH, "Requests that wait for their first slot.");
    counter(TOKENS, "Tokens that devices made.");
    counter(
        TOKENS_WASTED,
        "Tokens that devices made and nobody waited for any more.",
    );
    counter(
        CANCELLATIONS,
        "Requests whose client went away before their end.",
    );
    counter(
        IGNORED_FIELDS,
        "Fields of HTTP requests that were unknown and ignored (--unknown-fields ignore).",
    );
    gauge(WORKERS, "Workers, by what they are able to do.");
    counter(WORKERS_LOST, "Workers that were lost.");
    counter(
        RESUMPTIONS,
        "How often a choice whose worker was lost went on elsewhere.",
    );
    counter(
        TOKENS_REPLAYED,
        "Tokens that a stream had and another worker was given to go on behind.",
    );
    counter(
        LOG_LINES_DROPPED,
        "Lines of the log and of standard output that were dropped: their reader has gone, does not read or has no room.",
    );
    recorder.describe_histogram(
        RESUMPTION_GAP.into(),
        Some(Unit::Seconds),
        "How long a choice whose worker was lost had waited for its next token.".into(),
    );
}
