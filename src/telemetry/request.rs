//! The record of one request, for the metrics and the access log.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::time::Instant;

use super::request_gauge::RequestGauge;
use super::request_metrics::{CompletionObservation, Labels, TokenUsage};
use super::token_gaps::InterTokenTimes;
use super::{ResponseFormat, Telemetry};
use crate::error::ErrorKind;
use crate::keys::{KeyName, LimitedRequest};

/// The API that received a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// The gRPC API.
    Grpc,
    /// The HTTP API.
    Http,
}

impl Api {
    /// Both APIs.
    pub const ALL: [Self; 2] = [Self::Grpc, Self::Http];

    /// The value of the label `api`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// An HTTP route or an RPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The value of the label `route`: the path of the route, or the name of the RPC.
    pub name: &'static str,
    /// Kind of the route.
    pub kind: RouteKind,
}

impl Route {
    /// Stands for a request to a route that does not exist.
    pub const UNMATCHED: Self = Self {
        name: "unmatched",
        kind: RouteKind::Unmatched,
    };
}

/// Kind of a route. It decides whether a request is counted, logged and limited by a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// Completes prompts. The request lasts until the completion ends, its deadline error comes from the engine, and
    /// it is recorded in the histograms.
    Completion,
    /// Sends a single response.
    Unary,
    /// Reports the state of the server. It has no deadline and is not counted as in flight: otherwise each scrape of
    /// the metrics would count itself.
    Probe,
    /// Controls the server. The limits of API keys do not apply to it.
    Admin,
    /// No such route.
    Unmatched,
}

/// Outcome of a request: success, or the kind of its error.
pub type Outcome = Result<(), ErrorKind>;

/// Returns the value of the label `outcome`.
#[must_use]
pub(crate) fn outcome_label(outcome: Outcome) -> &'static str {
    outcome.map_or_else(|kind| kind.mapping().code, |()| "ok")
}

/// The record of one request: its route, and the facts that its handlers report. Each fact is set once; later reports
/// of the same fact are ignored. All times are in nanoseconds of CLOCK_MONOTONIC.
pub struct RequestRecord {
    telemetry: Telemetry,
    api: Api,
    route: Route,
    arrived_ns: u64,
    stream: RequestGauge,
    format: OnceLock<ResponseFormat>,
    key: OnceLock<KeyName>,
    limited: OnceLock<LimitedRequest>,
    model: OnceLock<Arc<str>>,
    has_requested_model: AtomicBool,
    /// Number of prompt tokens in the prompts that a worker has started.
    prompt_tokens: AtomicU64,
    /// Token counts that the engine reported at the end of the completion.
    usage: OnceLock<TokenUsage>,
    started_ns: OnceLock<u64>,
    gaps: Mutex<InterTokenTimes>,
    /// Method by which a gateway first continued the completion after its engine's stream broke.
    resumption: OnceLock<&'static str>,
    outcome: OnceLock<Outcome>,
}

impl RequestRecord {
    /// Starts the record of a request that arrived at `arrived_ns`. Does not count the request yet.
    #[must_use]
    pub fn new(telemetry: &Telemetry, api: Api, route: Route, arrived_ns: u64) -> Self {
        Self {
            telemetry: telemetry.clone(),
            api,
            route,
            arrived_ns,
            stream: RequestGauge::new(
                telemetry.requests_in_flight(api),
                telemetry.requests_lingering(api),
            ),
            format: OnceLock::new(),
            key: OnceLock::new(),
            limited: OnceLock::new(),
            model: OnceLock::new(),
            has_requested_model: AtomicBool::new(false),
            prompt_tokens: AtomicU64::new(0),
            usage: OnceLock::new(),
            started_ns: OnceLock::new(),
            gaps: Mutex::default(),
            resumption: OnceLock::new(),
            outcome: OnceLock::new(),
        }
    }

    /// The API that received the request.
    #[must_use]
    pub fn api(&self) -> Api {
        self.api
    }

    /// The route of the request.
    #[must_use]
    pub fn route(&self) -> Route {
        self.route
    }

    /// The metrics that count this request.
    #[must_use]
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// The counter of this request in the gauges of running requests.
    #[must_use]
    pub(crate) fn request_gauge(&self) -> &RequestGauge {
        &self.stream
    }

    /// Sets the name of the key with which the request was authenticated.
    pub(crate) fn set_key(&self, name: &KeyName) {
        self.key.get_or_init(|| name.clone());
    }

    /// The name of the request's key. `None` if the request was not authenticated.
    #[must_use]
    pub fn key(&self) -> Option<&KeyName> {
        self.key.get()
    }

    /// Sets the count of this request toward the limits of its key.
    pub(crate) fn set_limited(&self, limited: LimitedRequest) {
        self.limited.get_or_init(|| limited);
    }

    /// The count of this request toward the limits of its key. `None` if the request was not authenticated, or its
    /// route has no limits.
    pub(crate) fn limited(&self) -> Option<&LimitedRequest> {
        self.limited.get()
    }

    /// Sets the format of the response.
    pub fn set_format(&self, format: ResponseFormat) {
        self.format.get_or_init(|| format);
    }

    /// The format of the response. An HTTP response is unary unless a handler has set another format.
    #[must_use]
    pub fn format(&self) -> ResponseFormat {
        let default = match self.api {
            Api::Grpc => ResponseFormat::Grpc,
            Api::Http => ResponseFormat::HttpUnary,
        };
        self.format.get().copied().unwrap_or(default)
    }

    /// Reports the model name in the request. A model with this name may not exist.
    pub(crate) fn set_requested_model(&self, name: &str) {
        if !name.is_empty() {
            self.has_requested_model.store(true, Ordering::Relaxed);
        }
    }

    /// Sets the served model that the request uses. The name becomes a label value, so it must never be a name that a
    /// client made up.
    pub(crate) fn set_model(&self, served_name: &str) {
        self.model.get_or_init(|| served_name.into());
    }

    /// The value of the label `model`: the name of a served model, `unknown` if no model with the requested name is
    /// served, or `none`.
    #[must_use]
    pub(crate) fn model_label(&self) -> &str {
        match self.model.get() {
            Some(name) => name,
            None if self.has_requested_model.load(Ordering::Relaxed) => "unknown",
            None => "none",
        }
    }

    /// Reports that a worker has started a prompt with this number of tokens.
    pub fn record_start(&self, prompt_tokens: u32, now_ns: u64) {
        self.started_ns.get_or_init(|| now_ns);
        self.prompt_tokens
            .fetch_add(prompt_tokens.into(), Ordering::Relaxed);
    }

    /// Sets the usage that the engine reported at the end of the completion.
    pub(crate) fn set_usage(&self, usage: TokenUsage) {
        self.usage.get_or_init(|| usage);
    }

    /// Reports that a gateway has continued the completion by this method, after its engine's stream broke.
    pub(crate) fn set_resumption(&self, method: &'static str) {
        self.resumption.get_or_init(|| method);
    }

    /// The method by which a gateway first continued the completion. `None` if the stream never broke.
    #[must_use]
    pub fn resumption(&self) -> Option<&'static str> {
        self.resumption.get().copied()
    }

    /// The token counts of the request so far. `None` if no worker has started it.
    #[must_use]
    pub fn usage(&self) -> Option<TokenUsage> {
        self.started_ns.get()?;
        let so_far = || TokenUsage {
            prompt: self.prompt_tokens.load(Ordering::Relaxed),
            completion: self.with_gaps(|gaps| gaps.tokens()),
        };
        Some(self.usage.get().copied().unwrap_or_else(so_far))
    }

    /// Time between the arrival and the start on a worker.
    #[must_use]
    pub fn queue_ns(&self) -> Option<u64> {
        let started_ns = self.started_ns.get()?;
        Some(started_ns.saturating_sub(self.arrived_ns))
    }

    /// Time between the arrival and the first written token.
    #[must_use]
    pub fn first_token_ns(&self) -> Option<u64> {
        let first_ns = self.with_gaps(|gaps| gaps.first_ns())?;
        Some(first_ns.saturating_sub(self.arrived_ns))
    }

    /// Time since the request arrived.
    #[must_use]
    pub(crate) fn age_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.arrived_ns)
    }

    /// Adds the measured times between tokens to this record.
    pub(crate) fn add_gaps(&self, gaps: &mut InterTokenTimes) {
        self.with_gaps(|all| all.take_from(gaps));
    }

    /// The outcome, once the request has ended.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome.get().copied()
    }

    /// Counts the request as in flight from now on.
    pub(crate) fn count_in_flight(&self) {
        self.stream.begin();
    }

    /// Counts the end of the request. Later calls have no effect.
    pub fn record_end(&self, outcome: Outcome, now_ns: u64) {
        if self.outcome.set(outcome).is_err() {
            return;
        }
        if let Some(limited) = self.limited() {
            let usage = self.usage().unwrap_or_default();
            limited.end(usage.prompt + usage.completion, Instant::now());
        }
        let outcome = outcome_label(outcome);
        self.telemetry
            .count_request(self.api, self.route.name, outcome);
        if let Some(key) = self.key() {
            self.telemetry.count_key_request(key, outcome, self.usage());
        }
        if self.route.kind != RouteKind::Completion {
            return;
        }
        let labels = Labels {
            model: self.model_label().into(),
            api: self.api.label(),
            outcome,
        };
        let observation = CompletionObservation {
            duration_ns: self.age_ns(now_ns),
            queue_ns: self.queue_ns(),
            first_token_ns: self.first_token_ns(),
            usage: self.usage().unwrap_or_default(),
        };
        let requests = &self.telemetry.request_metrics;
        self.with_gaps(|gaps| requests.record(labels, &observation, gaps));
    }

    /// Counts a request that was rejected before any part of a response was sent.
    pub(crate) fn record_rejection(&self, kind: ErrorKind, now_ns: u64) {
        if self.outcome.get().is_none() {
            self.telemetry.count_rejection(self.api, kind);
        }
        self.record_end(Err(kind), now_ns);
    }

    /// Ends a request whose response has been sent completely or was dropped. If no handler has reported an outcome,
    /// the client has cancelled the request or read too slowly.
    pub(crate) fn record_close(&self, now_ns: u64) {
        if self.outcome.get().is_none() {
            let kind = if self.stream.is_lingering() {
                ErrorKind::SlowReader
            } else if std::thread::panicking() {
                ErrorKind::Internal
            } else {
                self.telemetry.cancellations.increment(1);
                ErrorKind::Cancelled
            };
            self.record_end(Err(kind), now_ns);
        }
        self.stream.close();
    }

    /// Locks the times between tokens. The lock is taken a few times per request, never per token.
    fn with_gaps<T>(&self, read: impl FnOnce(&mut InterTokenTimes) -> T) -> T {
        read(&mut self.gaps.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETIONS: Route = Route {
        name: "/v1/completions",
        kind: RouteKind::Completion,
    };

    fn gauges(telemetry: &Telemetry) -> [bool; 2] {
        let text = telemetry.render();
        ["in_flight", "lingering"]
            .map(|name| text.contains(&format!("tokenway_requests_{name}{{api=\"http\"}} 1")))
    }

    #[test]
    fn a_request_with_a_slow_reader_counts_as_lingering_until_it_is_closed() {
        let telemetry = Telemetry::new();
        let request = RequestRecord::new(&telemetry, Api::Http, COMPLETIONS, 0);
        request.count_in_flight();
        let stream = request.request_gauge().clone();
        assert_eq!(gauges(&telemetry), [true, false]);
        stream.linger();
        stream.linger();
        assert_eq!(gauges(&telemetry), [false, true]);
        request.record_close(1);
        stream.linger();
        assert_eq!(gauges(&telemetry), [false, false]);
        let text = telemetry.render();
        assert!(text.contains("outcome=\"slow_reader\"} 1"), "{text}");
        assert!(!text.contains("outcome=\"cancelled\""), "{text}");
    }

    #[test]
    fn only_names_of_served_models_become_labels() {
        let telemetry = Telemetry::new();
        let request = || RequestRecord::new(&telemetry, Api::Grpc, COMPLETIONS, 0);
        let (unnamed, unserved, served) = (request(), request(), request());
        unnamed.set_requested_model("");
        unserved.set_requested_model("client's choice");
        served.set_requested_model("alias");
        served.set_model("name");
        let labels = [unnamed, unserved, served].map(|it| it.model_label().to_owned());
        assert_eq!(labels, ["none", "unknown", "name"]);
    }

    #[test]
    fn a_request_ends_once() {
        let telemetry = Telemetry::new();
        let request = RequestRecord::new(&telemetry, Api::Http, COMPLETIONS, 0);
        request.record_end(Ok(()), 1);
        request.record_rejection(ErrorKind::QueueFull, 2);
        request.record_close(3);
        let text = telemetry.render();
        let ends: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("tokenway_requests_total{"))
            .collect();
        let expected =
            "tokenway_requests_total{api=\"http\",route=\"/v1/completions\",outcome=\"ok\"} 1";
        assert_eq!(ends, [expected]);
        assert!(!text.contains("queue_full"), "{text}");
    }
}
