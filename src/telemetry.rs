//! The Prometheus metrics, their names and their labels. Label values come from closed sets. They never contain a
//! prompt, a completion or a key.
//!
//! Each server has its own recorder instead of a global one, so that two servers in one process have separate
//! metrics.

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
use crate::error::ErrorKind;
use crate::output;

mod connections;
mod engines;
mod histogram;
mod keys;
mod latency;
mod prefix_cache;
mod request;
mod request_gauge;
mod request_metrics;
mod token_gaps;

pub(crate) use connections::ConnectionLimit;
pub(crate) use engines::PrefixPlacement;
pub(crate) use keys::AuthenticationFailure;
pub use latency::{ResponseFormat, Stage, StageSummary, StageTimes};
pub(crate) use prefix_cache::PrefixCacheMeter;
pub use prefix_cache::PrefixCacheMetrics;
pub(crate) use request::outcome_label;
pub use request::{Api, Outcome, RequestRecord, Route, RouteKind};
pub(crate) use request_gauge::RequestGauge;
use request_metrics::RequestMetrics;
pub use request_metrics::TokenUsage;
pub(crate) use token_gaps::InterTokenTimes;

const REQUESTS: &str = "tokenway_requests_total";
const REQUESTS_REJECTED: &str = "tokenway_requests_rejected_total";
const REQUESTS_IN_FLIGHT: &str = "tokenway_requests_in_flight";
const REQUESTS_LINGERING: &str = "tokenway_requests_lingering";
const SEQUENCES: &str = "tokenway_sequences_running";
const REQUESTS_QUEUED: &str = "tokenway_requests_queued";
const TOKENS_GENERATED: &str = "tokenway_tokens_generated_total";
const TOKENS_WASTED: &str = "tokenway_tokens_wasted_total";
const CANCELLATIONS: &str = "tokenway_cancellations_total";
const IGNORED_FIELDS: &str = "tokenway_ignored_fields_total";
const WORKERS: &str = "tokenway_workers";
const WORKERS_LOST: &str = "tokenway_workers_lost_total";
const RESUMPTIONS: &str = "tokenway_resumptions_total";
const TOKENS_REPLAYED: &str = "tokenway_tokens_replayed_total";
const RESUMPTION_GAP: &str = "tokenway_resumption_gap_seconds";
const LOG_LINES_DROPPED: &str = "tokenway_log_lines_dropped_total";

/// The bucket bounds of the resumption gap, in seconds.
const RESUMPTION_GAP_BUCKETS: [f64; 10] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

const RECORDER_METADATA: Metadata<'static> =
    Metadata::new("tokenway", Level::INFO, Some("tokenway"));

/// A handle to the metrics of one server. Clones share the metrics.
#[derive(Clone)]
pub struct Telemetry(Arc<Metrics>);

/// All metrics that have no labels, and the recorder from which metrics with labels are obtained.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// Sequences that hold a slot of a device.
    pub sequences_running: Gauge,
    /// Requests that wait for their first slot.
    pub requests_queued: Gauge,
    /// Tokens that devices generated.
    pub tokens_generated: Counter,
    /// Tokens that devices generated and no client received.
    pub tokens_wasted: Counter,
    /// Requests whose client disconnected before their end.
    cancellations: Counter,
    /// Unknown request fields that were ignored.
    pub ignored_fields: Counter,
    /// Losses of workers.
    pub workers_lost: Counter,
    /// Resumptions of a choice on another worker.
    pub resumptions: Counter,
    /// Tokens that were sent again to another worker, so that the worker resumes a choice after them.
    pub tokens_replayed: Counter,
    /// The prefix caches of all workers.
    pub prefix_cache: PrefixCacheMetrics,
    /// The time from the loss of a choice's worker to its next token, in seconds.
    pub resumption_gap_seconds: Histogram,
    /// Lines of the log and of standard output that were dropped.
    log_lines_dropped: Counter,
    token_latency: TokenLatency,
    request_metrics: RequestMetrics,
}

impl Deref for Telemetry {
    type Target = Metrics;

    fn deref(&self) -> &Metrics {
        &self.0
    }
}

/// A listener of the server, as the label `listener` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// The admin listener.
    Admin,
    /// The gRPC API.
    Grpc,
    /// The OpenAI-compatible HTTP API.
    Http,
    /// The listener for workers.
    Worker,
}

impl ListenerKind {
    /// Returns the value of the label `listener`.
    #[must_use]
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Grpc => "grpc",
            Self::Http => "http",
            Self::Worker => "worker",
        }
    }
}

/// The state of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkerState {
    /// The worker loads its model for the first time.
    Loading,
    /// The worker accepts sequences.
    Ready,
    /// The worker crashed or hangs. If the engine started the worker, it is being restarted.
    Lost,
    /// The worker failed to load its model, and tries again.
    Failed,
    /// The worker failed to start too often, and is not started again.
    GivenUp,
}

/// The number of workers in each state.
pub(crate) type WorkerCounts = BTreeMap<WorkerState, u32>;

impl WorkerState {
    /// Every state.
    pub(crate) const ALL: [Self; 5] = [
        Self::Loading,
        Self::Ready,
        Self::Lost,
        Self::Failed,
        Self::GivenUp,
    ];

    /// Returns the value of the label `state`. `/readyz` shows the same value.
    #[must_use]
    pub(crate) fn label(self) -> &'static str {
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
    /// Creates metrics that are all zero.
    #[must_use]
    pub fn new() -> Self {
        let gap = Matcher::Full(RESUMPTION_GAP.to_owned());
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(gap, &RESUMPTION_GAP_BUCKETS)
            .expect("the list of histogram buckets is not empty")
            .build_recorder();
        let handle = recorder.handle();
        describe(&recorder);
        connections::describe(&recorder);
        engines::describe(&recorder);
        keys::describe(&recorder);
        prefix_cache::describe(&recorder);
        let counter =
            |name| recorder.register_counter(&Key::from_static_name(name), &RECORDER_METADATA);
        let gauge =
            |name| recorder.register_gauge(&Key::from_static_name(name), &RECORDER_METADATA);
        let telemetry = Self(Arc::new(Metrics {
            sequences_running: gauge(SEQUENCES),
            requests_queued: gauge(REQUESTS_QUEUED),
            tokens_generated: counter(TOKENS_GENERATED),
            tokens_wasted: counter(TOKENS_WASTED),
            cancellations: counter(CANCELLATIONS),
            ignored_fields: counter(IGNORED_FIELDS),
            workers_lost: counter(WORKERS_LOST),
            resumptions: counter(RESUMPTIONS),
            tokens_replayed: counter(TOKENS_REPLAYED),
            prefix_cache: PrefixCacheMetrics::new(&recorder),
            resumption_gap_seconds: recorder
                .register_histogram(&Key::from_static_name(RESUMPTION_GAP), &RECORDER_METADATA),
            log_lines_dropped: counter(LOG_LINES_DROPPED),
            token_latency: TokenLatency::default(),
            request_metrics: RequestMetrics::default(),
            recorder,
            handle,
        }));
        for api in Api::ALL {
            telemetry.requests_in_flight(api).set(0.0);
            telemetry.requests_lingering(api).set(0.0);
        }
        for frontend in [
            ListenerKind::Admin,
            ListenerKind::Grpc,
            ListenerKind::Http,
            ListenerKind::Worker,
        ] {
            telemetry.connections(frontend).set(0.0);
        }
        telemetry.sequences_running.set(0.0);
        telemetry.requests_queued.set(0.0);
        for state in WorkerState::ALL {
            telemetry.workers(state).set(0.0);
        }
        telemetry
    }

    /// Renders all metrics in Prometheus's text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.log_lines_dropped.absolute(output::dropped_lines());
        let mut text = self.handle.render();
        self.token_latency
            .write(&mut text)
            .and_then(|()| self.request_metrics.write(&mut text))
            .expect("writing to a `String` cannot fail");
        text
    }

    /// Creates the recorder of one request's token latencies in one stage.
    #[must_use]
    pub fn stage_times(&self, format: ResponseFormat, stage: Stage) -> StageTimes {
        self.token_latency.times(format, stage)
    }

    /// Returns the gauge of the workers in this state.
    pub fn workers(&self, state: WorkerState) -> Gauge {
        self.labelled_gauge(WORKERS, &[("state", state.label())])
    }

    /// Counts a request that has ended.
    fn count_request(&self, api: Api, route: &'static str, outcome: &'static str) {
        let labels = [("api", api.label()), ("route", route), ("outcome", outcome)];
        self.labelled_counter(REQUESTS, &labels).increment(1);
    }

    /// Counts a request that was rejected before any part of a response was sent.
    fn count_rejection(&self, api: Api, kind: ErrorKind) {
        let labels = [("api", api.label()), ("reason", kind.mapping().code)];
        self.labelled_counter(REQUESTS_REJECTED, &labels)
            .increment(1);
    }

    fn requests_in_flight(&self, api: Api) -> Gauge {
        self.labelled_gauge(REQUESTS_IN_FLIGHT, &[("api", api.label())])
    }

    fn requests_lingering(&self, api: Api) -> Gauge {
        self.labelled_gauge(REQUESTS_LINGERING, &[("api", api.label())])
    }

    fn labelled_counter(
        &self,
        name: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Counter {
        self.recorder
            .register_counter(&metric_key(name, labels), &RECORDER_METADATA)
    }

    fn labelled_gauge(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Gauge {
        self.recorder
            .register_gauge(&metric_key(name, labels), &RECORDER_METADATA)
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

/// Keeps a gauge incremented by one until this guard is dropped.
pub(crate) struct GaugeGuard {
    gauge: Gauge,
}

impl GaugeGuard {
    /// Increments `gauge` by one.
    #[must_use]
    pub(crate) fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self { gauge }
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.gauge.decrement(1.0);
    }
}

fn metric_key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
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
        "Requests that have ended, by API, route and outcome: 'ok' or an error code.",
    );
    counter(
        REQUESTS_REJECTED,
        "Requests rejected before any part of a response was sent, by API and error code.",
    );
    gauge(
        REQUESTS_IN_FLIGHT,
        "Requests from their arrival until their response has ended, by API. Probes and /metrics are not counted.",
    );
    gauge(
        REQUESTS_LINGERING,
        "Requests that ended as slow_reader and whose connection stays open so that the client can read the \
         error, by API. They last at most the write timeout and are not in flight.",
    );
    gauge(SEQUENCES, "Sequences that hold a slot of a device.");
    gauge(REQUESTS_QUEUED, "Requests that wait for their first slot.");
    counter(TOKENS_GENERATED, "Tokens that devices generated.");
    counter(
        TOKENS_WASTED,
        "Tokens that devices generated and no client received.",
    );
    counter(
        CANCELLATIONS,
        "Requests whose client disconnected before their end.",
    );
    counter(
        IGNORED_FIELDS,
        "Unknown fields of HTTP requests that were ignored (--unknown-fields ignore).",
    );
    gauge(WORKERS, "Workers, by state.");
    counter(
        WORKERS_LOST,
        "Losses of workers. A restarted worker can be lost again.",
    );
    counter(
        RESUMPTIONS,
        "Resumptions of a choice on another worker after its worker was lost.",
    );
    counter(
        TOKENS_REPLAYED,
        "Tokens that were sent to another worker so that it resumes a choice after them.",
    );
    counter(
        LOG_LINES_DROPPED,
        "Lines of the log and of standard output that were dropped because they could not be written.",
    );
    recorder.describe_histogram(
        RESUMPTION_GAP.into(),
        Some(Unit::Seconds),
        "Time from the loss of a choice's worker to the choice's next token.".into(),
    );
}
