//! The layers, around routes that the tests define.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Version};
use axum::routing::{any, get};
use http_body::Frame;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tonic::Status;
use tower::ServiceExt;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::util::SubscriberInitExt;

use super::*;
use crate::caller::PrefixSharing;
use crate::context::RequestContext;
use crate::delivery::FlushHandle;
use crate::error::{Error, ErrorKind};
use crate::logging::{JsonFields, JsonLines, Timestamps};
use crate::request_memory::RequestMemory;
use crate::telemetry::Telemetry;

const APIS: [Api; 2] = Api::ALL;

/// An API with routes that panic, never answer, and answer with the context's id.
struct TestApi {
    api: Api,
    telemetry: Telemetry,
    router: Router,
}

impl TestApi {
    fn new(api: Api) -> Self {
        let telemetry = Telemetry::new();
        let routes = Router::new()
            .route(
                unary(api),
                any(async |it: RequestContext| it.id().0.to_string()),
            )
            .route(panicking(api), any(async || -> String { panic!("a bug") }))
            .route(pending(api), any(std::future::pending::<String>))
            .route("/livez", any(async || "alive"))
            .route("/dropped", any(async || Body::new(LogsDrop)))
            .fallback(async || "no such route");
        let layers = Layers {
            api,
            browser_check: None,
            settings: LayerSettings {
                telemetry: telemetry.clone(),
                request_timeout: Duration::from_secs(60),
                access_log: false,
                authenticator: None,
                request_memory: RequestMemory::new(0),
                prefix_sharing: PrefixSharing::All,
            },
        };
        let router = with_layers(routes, layers);
        Self {
            api,
            telemetry,
            router,
        }
    }

    fn request(path: &str, headers: &[(&str, &str)]) -> http::Request<Body> {
        // The gRPC API requires its content type.
        let request = http::Request::get(path).version(Version::HTTP_2);
        let mut request = request.header("content-type", "application/grpc");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let flush = FlushHandle::new(Arc::default(), Version::HTTP_2);
        request
            .extension(flush)
            .body(Body::empty())
            .expect("a request")
    }

    async fn send(&self, path: &str, headers: &[(&str, &str)]) -> TestResponse {
        let response = self
            .router
            .clone()
            .oneshot(Self::request(path, headers))
            .await;
        let (parts, body) = response.unwrap_or_else(|never| match never {}).into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        TestResponse {
            api: self.api,
            headers: parts.headers,
            body: String::from_utf8(body.to_vec()).expect("UTF-8"),
        }
    }

    /// The lines of the metrics that begin with `tokenway_requests_` and have a value other than 0.
    fn counts(&self) -> Vec<String> {
        let text = self.telemetry.render();
        let lines = text.lines();
        let mut counts: Vec<_> = lines
            .filter_map(|line| line.strip_prefix("tokenway_requests_"))
            .filter(|line| line.contains('{') && !line.ends_with(" 0"))
            .map(str::to_owned)
            .collect();
        counts.sort();
        counts
    }
}

/// A body that never ends, and logs a line when it is dropped.
struct LogsDrop;

impl http_body::Body for LogsDrop {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

impl Drop for LogsDrop {
    fn drop(&mut self) {
        tracing::warn!("the body is dropped");
    }
}

/// The log of this thread.
struct ThreadLog {
    file: NamedTempFile,
    _guard: DefaultGuard,
}

impl ThreadLog {
    fn start() -> Self {
        let file = NamedTempFile::new().expect("a temporary file");
        let writer = file.reopen().expect("the file can be opened");
        let timestamps = Timestamps::Off;
        let subscriber = tracing_subscriber::fmt()
            .with_writer(Arc::new(writer))
            .fmt_fields(JsonFields)
            .event_format(JsonLines { timestamps });
        Self {
            file,
            _guard: subscriber.set_default(),
        }
    }

    /// The request id in the line with this message.
    fn id_of(&self, message: &str) -> Value {
        let text = std::fs::read_to_string(self.file.path()).expect("the log is UTF-8");
        let lines = text.lines().map(serde_json::from_str::<Value>);
        let mut lines = lines.map(|line| line.expect("each line is JSON"));
        let line = lines.find(|line| line["message"] == message);
        line.unwrap_or_else(|| panic!("no line '{message}': {text}"))["id"].clone()
    }
}

struct TestResponse {
    api: Api,
    headers: HeaderMap,
    body: String,
}

impl TestResponse {
    fn id(&self) -> &str {
        let id = self.headers.get("x-request-id").expect("an id is returned");
        id.to_str().expect("ASCII")
    }

    /// The kind of the error that the response reports.
    fn error(&self) -> Option<ErrorKind> {
        match self.api {
            Api::Http => {
                let body: Value = serde_json::from_str(&self.body).unwrap_or_default();
                ErrorKind::from_code(body["error"]["code"].as_str()?)
            }
            Api::Grpc => Some(Error::from(&Status::from_header_map(&self.headers)?).kind),
        }
    }
}

fn unary(api: Api) -> &'static str {
    match api {
        Api::Http => "/v1/models",
        Api::Grpc => "/tokenway.v1.Inference/GetModel",
    }
}

fn panicking(api: Api) -> &'static str {
    match api {
        Api::Http => "/tokenize",
        Api::Grpc => "/tokenway.v1.Inference/Tokenize",
    }
}

fn pending(api: Api) -> &'static str {
    match api {
        Api::Http => "/detokenize",
        Api::Grpc => "/tokenway.v1.Inference/Detokenize",
    }
}

#[tokio::test]
async fn a_panic_in_a_handler_answers_internal_error_and_is_counted() {
    for api in APIS {
        let tested = TestApi::new(api);
        let answer = tested
            .send(panicking(api), &[("x-request-id", "mine")])
            .await;
        assert_eq!(answer.error(), Some(ErrorKind::Internal), "{api:?}");
        assert_eq!(answer.id(), "mine");
        let route = panicking(api);
        let route = if api == Api::Grpc { &route[1..] } else { route };
        let label = api.label();
        assert_eq!(
            tested.counts(),
            [
                format!("rejected_total{{api=\"{label}\",reason=\"internal_error\"}} 1"),
                format!("total{{api=\"{label}\",route=\"{route}\",outcome=\"internal_error\"}} 1"),
            ],
        );
    }
}

#[tokio::test]
async fn a_panic_in_a_handler_is_logged_with_the_requests_id() {
    for api in APIS {
        let log = ThreadLog::start();
        TestApi::new(api)
            .send(panicking(api), &[("x-request-id", "mine")])
            .await;
        assert_eq!(log.id_of("the handler of a request panicked"), "mine");
    }
}

#[tokio::test]
async fn a_line_that_a_dropped_body_logs_has_the_requests_id() {
    for api in APIS {
        let log = ThreadLog::start();
        let request = TestApi::request("/dropped", &[("x-request-id", "mine")]);
        let response = TestApi::new(api).router.oneshot(request).await;
        drop(response.unwrap_or_else(|never| match never {}));
        assert_eq!(log.id_of("the body is dropped"), "mine");
    }
}

#[tokio::test]
async fn a_valid_request_id_is_returned_and_a_missing_one_is_made() {
    let longest = "x".repeat(128);
    for api in APIS {
        let tested = TestApi::new(api);
        for id in ["a", "!~", &longest] {
            let answer = tested.send(unary(api), &[("x-request-id", id)]).await;
            assert_eq!((answer.id(), &*answer.body), (id, id), "{api:?}");
            assert_eq!(
                tested.send("/no/such", &[("x-request-id", id)]).await.id(),
                id
            );
        }
        let one = tested.send(unary(api), &[]).await;
        let other = tested.send(unary(api), &[]).await;
        assert_eq!(one.id(), one.body);
        assert_ne!(one.id(), other.id());
    }
}

#[tokio::test]
async fn an_invalid_request_id_is_rejected_and_replaced() {
    let too_long = "x".repeat(129);
    for api in APIS {
        let tested = TestApi::new(api);
        for id in ["", "a b", "é", &too_long] {
            let answer = tested.send(unary(api), &[("x-request-id", id)]).await;
            assert_eq!(
                answer.error(),
                Some(ErrorKind::InvalidValue),
                "{api:?} {id}"
            );
            assert_eq!(answer.id().len(), 32, "a random id");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_answered_before_its_deadline_fails() {
    for (api, name, value, seconds) in [
        (Api::Http, "x-request-timeout", "2.5", 2.5),
        (Api::Grpc, "grpc-timeout", "1500m", 1.5),
        (Api::Http, "accept", "*/*", 60.0),
        (Api::Grpc, "accept", "*/*", 60.0),
    ] {
        let tested = TestApi::new(api);
        let start = tokio::time::Instant::now();
        let answer = tested.send(pending(api), &[(name, value)]).await;
        assert_eq!(answer.error(), Some(ErrorKind::DeadlineExceeded));
        assert_eq!(
            start.elapsed(),
            Duration::from_secs_f64(seconds),
            "{api:?} {value}"
        );
    }
}

#[tokio::test]
async fn an_invalid_timeout_is_rejected_except_by_probes() {
    for (api, name) in [
        (Api::Http, "x-request-timeout"),
        (Api::Grpc, "grpc-timeout"),
    ] {
        let tested = TestApi::new(api);
        let answer = tested.send(unary(api), &[(name, "soon")]).await;
        assert_eq!(answer.error(), Some(ErrorKind::InvalidValue), "{api:?}");
    }
    let answer = TestApi::new(Api::Http)
        .send("/livez", &[("x-request-timeout", "soon")])
        .await;
    assert_eq!(answer.body, "alive");
}

#[tokio::test]
async fn every_request_is_in_flight_from_its_arrival_until_it_is_dropped() {
    for api in APIS {
        let tested = TestApi::new(api);
        let unmatched = TestApi::request("/no/such", &[]);
        let unmatched = tested.router.clone().oneshot(unmatched).await;
        let label = api.label();
        let in_flight = format!("in_flight{{api=\"{label}\"}} 1");
        assert!(tested.counts().contains(&in_flight), "{api:?}");
        drop(unmatched);
        assert!(!tested.counts().contains(&in_flight), "{api:?}");

        let tested = TestApi::new(api);
        let handled = tested
            .router
            .clone()
            .oneshot(TestApi::request(pending(api), &[]));
        let mut handled = Box::pin(handled);
        assert!(futures_util::poll!(&mut handled).is_pending());
        assert_eq!(tested.counts(), [in_flight]);
        drop(handled);
        let counts = tested.counts();
        assert_eq!(counts.len(), 1, "{counts:?}");
        assert!(
            counts[0].ends_with("outcome=\"cancelled\"} 1"),
            "{counts:?}"
        );
    }
}

#[tokio::test]
async fn a_handler_that_finds_no_context_answers_internal_error() {
    let bypassed = Router::new().route("/", get(async |it: RequestContext| it.id().0.to_string()));
    let request = http::Request::get("/")
        .body(Body::empty())
        .expect("a request");
    let response = bypassed.oneshot(request).await.expect("an answer");
    let body = response
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(body["error"]["code"], json!("internal_error"));
}
