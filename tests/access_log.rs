//! The access log: one line for each request, when it ends.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{Request as HttpRequest, completion, get, post};
use support::http2::Connection;
use support::log::LOG;
use support::{Setup, TestServer, full_speed, grpc, silent_at, with_interval};
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::time::timeout;
use tonic::{Request, Status, Streaming};

/// A request with this id, to be sent to a server that no other test uses.
struct RequestCase {
    id: String,
    setup: Setup,
}

impl RequestCase {
    fn new(id: &str, setup: Setup) -> Self {
        // Start the capture of the log before the server logs its first line.
        LOG.lines();
        Self {
            id: id.to_owned(),
            setup,
        }
    }

    /// Sends an HTTP request and reads the response. Returns the request's line in the access log. There must be only
    /// one.
    async fn run_http(self, request: HttpRequest) -> Value {
        let server = self.setup.start().await;
        request
            .header("x-request-id", &self.id)
            .fetch(&server)
            .await;
        access_log_line(server, &self.id).await
    }

    /// Sends a completion request over gRPC with this timeout and reads its stream. Returns the request's line in the
    /// access log.
    async fn run_grpc(self, request: v1::CompletionRequest, seconds: Option<f64>) -> Value {
        let server = self.setup.start().await;
        let mut request = with_id(request, &self.id);
        if let Some(seconds) = seconds {
            request.set_timeout(Duration::from_secs_f64(seconds));
        }
        if let Ok(response) = server.grpc().await.complete(request).await {
            grpc::collect(response.into_inner()).await;
        }
        access_log_line(server, &self.id).await
    }
}

fn with_id<T>(message: T, id: &str) -> Request<T> {
    let mut request = Request::new(message);
    let id = id.parse().expect("an id is a metadata value");
    request.metadata_mut().insert("x-request-id", id);
    request
}

/// Drains the server, so that every request has ended. Returns the access log's line about this request. There must
/// be only one.
async fn access_log_line(server: TestServer, id: &str) -> Value {
    server.drain().await.assert_all_gauges_are_zero();
    let lines = LOG.access_lines(id);
    assert_eq!(lines.len(), 1, "{id}: {lines:?}");
    lines[0].clone()
}

/// Asserts the API, the status and the outcome in a line of the access log.
fn assert_ended(line: &Value, status: impl Into<Value>, outcome: &str) {
    let status: Value = status.into();
    assert_eq!(
        (&line["status"], &line["outcome"]),
        (&status, &json!(outcome)),
        "{line}"
    );
}

fn completion_of(count: u32) -> HttpRequest {
    completion(&json!({"prompt": "a b c", "max_tokens": count, "stream": true}))
}

#[tokio::test]
async fn a_completion_logs_its_model_tokens_and_times() {
    let setup = || Setup::test_runner(full_speed());
    let http = RequestCase::new("ok-http", setup())
        .run_http(completion_of(5))
        .await;
    assert_ended(&http, 200, "ok");
    assert_eq!(http["route"], "/v1/completions");
    let unary = completion(&json!({"prompt": "a b c", "max_tokens": 5}));
    let unary = RequestCase::new("ok-unary", setup()).run_http(unary).await;
    assert_ended(&unary, 200, "ok");
    let grpc = RequestCase::new("ok-grpc", setup())
        .run_grpc(grpc::request("a b c", 5), None)
        .await;
    assert_ended(&grpc, "OK", "ok");
    assert_eq!(grpc["route"], "tokenway.v1.Inference/Complete");
    for line in [&http, &unary, &grpc] {
        assert_eq!(
            (&line["model"], &line["completion_tokens"]),
            (&json!("llm_test"), &json!(5))
        );
        assert_eq!(line["message"], "request");
        assert_eq!(line["level"], "INFO");
        assert!(line["prompt_tokens"].as_u64() > Some(0), "{line}");
        let milliseconds = |name: &str| {
            line[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {line}"))
        };
        assert!(
            milliseconds("queue_ms") <= milliseconds("first_token_ms"),
            "{line}"
        );
        assert!(
            milliseconds("first_token_ms") <= milliseconds("total_ms"),
            "{line}"
        );
        assert!(line["bytes"].as_u64() > Some(50), "{line}");
    }
    assert_eq!(
        (&http["api"], &grpc["api"]),
        (&json!("http"), &json!("grpc"))
    );
}

#[tokio::test]
async fn the_size_of_all_frames_of_a_stream_is_logged() {
    LOG.lines();
    let server = Setup::test_runner(full_speed()).start().await;
    let stream = completion_of(2_000).header("x-request-id", "bytes");
    let (_, body) = stream.fetch(&server).await;
    assert_eq!(
        access_log_line(server, "bytes").await["bytes"],
        body.text.len()
    );
}

#[tokio::test]
async fn a_rejected_request_logs_its_status_and_error_code() {
    let setup = || Setup::test_runner(full_speed());
    let http = RequestCase::new("400-http", setup())
        .run_http(completion_of(0))
        .await;
    assert_ended(&http, 400, "invalid_value");
    for absent in ["prompt_tokens", "queue_ms", "first_token_ms"] {
        assert!(http.get(absent).is_none(), "{http}");
    }
    let invalid = RequestCase::new("400-grpc", setup())
        .run_grpc(grpc::request("a", 0), None)
        .await;
    assert_ended(&invalid, "INVALID_ARGUMENT", "invalid_value");
    let unknown = completion(&json!({"prompt": "a", "model": "no-such-model"}));
    let unknown = RequestCase::new("404-http", setup())
        .run_http(unknown)
        .await;
    assert_ended(&unknown, 404, "model_not_found");
    assert_eq!(
        unknown["model"], "unknown",
        "a name that only the client knows is not logged"
    );
    let mut request = grpc::request("a", 1);
    "no-such-model".clone_into(&mut request.model);
    let unknown = RequestCase::new("404-grpc", setup())
        .run_grpc(request, None)
        .await;
    assert_ended(&unknown, "NOT_FOUND", "model_not_found");
    let unmatched = RequestCase::new("404-path", setup())
        .run_http(get("/no/such/path"))
        .await;
    assert_ended(&unmatched, 404, "not_found");
    assert_eq!(unmatched["route"], "unmatched");
    let large = vec![b' '; 5 * 1024 * 1024];
    let large = RequestCase::new("413-http", setup())
        .run_http(post("/v1/completions", large))
        .await;
    assert_ended(&large, 413, "request_too_large");
    let large = grpc::request(&"a".repeat(5 * 1024 * 1024), 1);
    let large = RequestCase::new("413-grpc", setup())
        .run_grpc(large, None)
        .await;
    assert_ended(&large, "OUT_OF_RANGE", "request_too_large");
    let host = get("/v1/models")
        .without_header("host")
        .header("host", "evil.example");
    let host = RequestCase::new("403-http", setup()).run_http(host).await;
    assert_ended(&host, 403, "host_not_allowed");
}

#[tokio::test]
async fn a_request_for_a_full_queue_is_logged_while_others_run() {
    let server = Setup::test_runner(silent_at(1))
        .slots(1)
        .queue_depth(1)
        .start()
        .await;
    LOG.lines();
    let running = server.stream(grpc::request("a", 100)).await;
    let running = wait_until_started(running).await;
    let queued = server.stream(grpc::request("a", 1)).await;
    completion_of(1)
        .header("x-request-id", "429-http")
        .fetch(&server)
        .await;
    let rejected = server
        .grpc()
        .await
        .complete(with_id(grpc::request("a", 1), "429-grpc"))
        .await;
    rejected.expect_err("the queue is full");
    drop((running, queued));
    server.drain().await.assert_all_gauges_are_zero();
    assert_ended(&LOG.access_lines("429-http")[0], 429, "queue_full");
    assert_ended(
        &LOG.access_lines("429-grpc")[0],
        "RESOURCE_EXHAUSTED",
        "queue_full",
    );
}

async fn wait_until_started(
    mut stream: Streaming<v1::CompletionEvent>,
) -> Streaming<v1::CompletionEvent> {
    let event = stream.message().await.expect("the stream continues");
    assert!(event.is_some());
    stream
}

#[tokio::test]
async fn a_cancelled_request_is_logged_once_with_the_tokens_it_got() {
    LOG.lines();
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    let mut http = completion_of(100_000)
        .header("x-request-id", "cancelled-http")
        .send(&server)
        .await;
    assert!(http.read_line().await.is_some());
    drop(http);
    let request = with_id(grpc::request("a", 100_000), "cancelled-grpc");
    drop(wait_until_started(server.stream(request).await).await);
    server.drain().await.assert_all_gauges_are_zero();
    let http = LOG.access_lines("cancelled-http");
    assert_eq!(http.len(), 1, "{http:?}");
    assert_ended(&http[0], 200, "cancelled");
    assert!(http[0]["completion_tokens"].as_u64() > Some(0), "{http:?}");
    let grpc = LOG.access_lines("cancelled-grpc");
    assert_eq!(grpc.len(), 1, "{grpc:?}");
    assert_eq!(grpc[0]["outcome"], "cancelled", "{grpc:?}");
}

#[tokio::test]
async fn a_client_that_disconnects_during_its_upload_is_logged_as_cancelled() {
    LOG.lines();
    for id in ["upload-fin", "upload-rst", "upload-http2"] {
        let server = Setup::test_runner(full_speed()).start().await;
        let upload = completion_of(1).header("x-request-id", id);
        match id {
            "upload-fin" => drop(upload.upload_unfinished(&server).await),
            "upload-rst" => {
                let stream = upload.upload_unfinished(&server).await;
                stream.set_zero_linger().expect("the option is set");
            }
            _ => {
                let connection = Connection::open(&server.http_address(), 65_535).await;
                connection.reset_upload(id).await;
            }
        }
        let counts = server.drain().await;
        counts.assert_all_gauges_are_zero();
        let lines = LOG.access_lines(id);
        assert_eq!(lines.len(), 1, "{id}: {lines:?}");
        assert_ended(&lines[0], 499, "cancelled");
        assert_eq!(counts.get("tokenway_cancellations_total"), 1.0, "{id}");
        assert!(!counts.0.contains("reason="), "{id}: {}", counts.0);
    }
}

#[tokio::test]
async fn a_lost_worker_and_a_passed_deadline_are_logged_as_the_outcome() {
    let panicking = || {
        let runner = TestRunnerOptions {
            panic_at: Some(2),
            ..full_speed()
        };
        Setup::test_runner(runner).without_resumption()
    };
    let lost = RequestCase::new("lost-http", panicking())
        .run_http(completion_of(5))
        .await;
    assert_ended(&lost, 200, "worker_lost");
    let lost = RequestCase::new("lost-grpc", panicking())
        .run_grpc(grpc::request("a", 5), None)
        .await;
    assert_ended(&lost, "ABORTED", "worker_lost");
    let late = completion_of(5).header("x-request-timeout", "0.1");
    let late = RequestCase::new("late-http", Setup::test_runner(silent_at(3)))
        .run_http(late)
        .await;
    assert_ended(&late, 200, "deadline_exceeded");
    assert_eq!(late["completion_tokens"], 3);
    let late = RequestCase::new("late-grpc", Setup::test_runner(silent_at(3)));
    // tonic's client would enforce the deadline itself, before the server does.
    let server = late.setup.start().await;
    let mut request = with_id(grpc::request("a", 5), &late.id);
    let timeout = "100m".parse().expect("a metadata value");
    request.metadata_mut().insert("grpc-timeout", timeout);
    grpc::collect(server.stream(request).await).await;
    let late = access_log_line(server, &late.id).await;
    assert_ended(&late, "DEADLINE_EXCEEDED", "deadline_exceeded");
}

#[tokio::test]
async fn a_request_that_a_draining_server_rejects_is_logged() {
    LOG.lines();
    let setup = Setup::test_runner(full_speed());
    let grace = Duration::from_secs(3_600);
    let server = setup.drain(grace, Duration::ZERO).start().await;
    let address = server.http_address();
    let mut grpc = server.grpc().await;
    let draining = tokio::spawn(server.drain());
    // The runtime has one thread, so the drain has started when this task runs again.
    tokio::task::yield_now().await;
    let http = completion_of(1).header("x-request-id", "draining-http");
    http.send_to(&address).await.read_rest().await;
    let request = with_id(grpc::request("a", 1), "draining-grpc");
    grpc.complete(request).await.expect_err("the engine drains");
    assert_ended(&LOG.access_lines("draining-http")[0], 503, "draining");
    let line = &LOG.access_lines("draining-grpc")[0];
    assert_ended(line, "UNAVAILABLE", "draining");
    draining.abort();
}

#[tokio::test]
async fn a_slow_reader_is_logged_as_the_outcome() {
    LOG.lines();
    let setup = Setup::test_runner(full_speed()).slots(2);
    let server = setup
        .slow_reader_timeout(Duration::from_millis(100))
        .start()
        .await;
    let stalled = completion_of(1_048_000)
        .header("x-request-id", "slow-http")
        .send(&server)
        .await;
    let grpc = with_id(grpc::request("a", 1_048_000), "slow-grpc");
    let grpc = wait_until_started(server.stream(grpc).await).await;
    // Both sequences have left their slots once both slow readers were dropped.
    let all = || async {
        support::metrics::MetricsSnapshot::take(&server).get("tokenway_sequences_running")
    };
    let freed = async {
        while all().await > 0.0 {
            grpc::collect(server.stream(grpc::request("a", 1_000)).await).await;
        }
    };
    timeout(Duration::from_secs(30), freed)
        .await
        .expect("the readers are given up");
    drop((stalled, grpc));
    server.drain().await.assert_all_gauges_are_zero();
    assert_ended(&LOG.access_lines("slow-http")[0], 200, "slow_reader");
    assert_eq!(LOG.access_lines("slow-grpc")[0]["outcome"], "slow_reader");
}

#[tokio::test]
async fn every_rpc_is_logged_and_probes_are_logged_at_debug() {
    LOG.lines();
    let server = Setup::test_runner(full_speed()).start().await;
    let mut grpc = server.grpc().await;
    let model = || "llm_test".to_owned();
    let models = v1::ListModelsRequest {};
    assert!(grpc.list_models(with_id(models, "rpc-list")).await.is_ok());
    let get_model = v1::GetModelRequest { model: model() };
    assert!(grpc.get_model(with_id(get_model, "rpc-get")).await.is_ok());
    let tokenize = v1::TokenizeRequest {
        model: model(),
        input: Some(v1::tokenize_request::Input::Text("a".to_owned())),
        ..v1::TokenizeRequest::default()
    };
    assert!(
        grpc.tokenize(with_id(tokenize, "rpc-tokenize"))
            .await
            .is_ok()
    );
    let detokenize = v1::DetokenizeRequest {
        model: "x".to_owned(),
        token_ids: vec![1],
    };
    let answer = grpc.detokenize(with_id(detokenize, "rpc-detokenize")).await;
    assert_eq!(
        answer.map_err(|status: Status| status.code()).err(),
        Some(tonic::Code::NotFound)
    );
    get("/livez")
        .header("x-request-id", "probe")
        .fetch(&server)
        .await;
    drop(grpc);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    let counted = |rpc: &str, outcome: &str| {
        let labels =
            format!("api=\"grpc\",route=\"tokenway.v1.Inference/{rpc}\",outcome=\"{outcome}\"");
        counts.get(&format!("tokenway_requests_total{{{labels}}}"))
    };
    for (id, rpc, status, outcome) in [
        ("rpc-list", "ListModels", "OK", "ok"),
        ("rpc-get", "GetModel", "OK", "ok"),
        ("rpc-tokenize", "Tokenize", "OK", "ok"),
        (
            "rpc-detokenize",
            "Detokenize",
            "NOT_FOUND",
            "model_not_found",
        ),
    ] {
        let lines = LOG.access_lines(id);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_ended(&lines[0], status, outcome);
        assert_eq!(lines[0]["route"], format!("tokenway.v1.Inference/{rpc}"));
        assert_eq!(counted(rpc, outcome), 1.0, "{}", counts.0);
    }
    assert_eq!(LOG.access_lines("rpc-get")[0]["model"], "llm_test");
    assert_eq!(LOG.access_lines("probe")[0]["level"], "DEBUG");
}

#[tokio::test]
async fn the_access_log_can_be_disabled() {
    LOG.lines();
    let mut setup = Setup::test_runner(full_speed());
    setup.parts.access_log = false;
    let server = setup.start().await;
    completion_of(1)
        .header("x-request-id", "disabled")
        .fetch(&server)
        .await;
    server.drain().await;
    assert!(LOG.access_lines("disabled").is_empty());
}
