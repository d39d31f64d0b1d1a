//! Every failure has its status, code and field on both doors, before the first byte or as the last
//! record of a stream.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use support::http::{End, Request, completion, get, post};
use support::{Setup, TestServer, every, full_speed, grpc, silent_at};
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{LoadError, Loaded, Loader};
use tonic::Code;

/// An HTTP refusal: its status, its code and its field.
type Refusal = (u16, String, Option<String>);

async fn refusal(server: &TestServer, request: Request) -> Refusal {
    let (response, body) = request.fetch(server).await;
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert!(response.header("x-request-id").is_some());
    let (code, param) = body.error();
    (response.status, code, param)
}

fn refused(status: u16, code: &str, param: Option<&str>) -> Refusal {
    (status, code.to_owned(), param.map(str::to_owned))
}

/// What the gRPC door says to a request.
async fn grpc_error(server: &TestServer, request: v1::CompletionRequest) -> (Code, Error) {
    let status = server
        .grpc()
        .await
        .complete(request)
        .await
        .expect_err("a refusal");
    (status.code(), Error::from(&status))
}

#[tokio::test]
async fn bad_bodies_are_refused_with_their_field() {
    let server = Setup::test_runner(full_speed()).start().await;
    let deep = "[".repeat(100_000);
    let cases: Vec<(Vec<u8>, Refusal)> = vec![
        (b"{".to_vec(), refused(400, "invalid_json", None)),
        (
            b"{\"prompt\":\"\xff\"}".to_vec(),
            refused(400, "invalid_json", None),
        ),
        (deep.into_bytes(), refused(400, "invalid_json", None)),
        (
            b"{\"prompt\":\"a\",\"temperature\":NaN}".to_vec(),
            refused(400, "invalid_json", None),
        ),
        (b"[]".to_vec(), refused(400, "invalid_type", None)),
    ];
    for (body, expected) in cases {
        assert_eq!(
            refusal(&server, post("/v1/completions", body)).await,
            expected
        );
    }
    for (body, code, param) in [
        (json!({}), "missing_parameter", "prompt"),
        (json!({"prompt": 1}), "invalid_type", "prompt"),
        (json!({"prompt": []}), "invalid_value", "prompt"),
        (
            json!({"prompt": "a", "max_tokens": 0}),
            "invalid_value",
            "max_tokens",
        ),
        (
            json!({"prompt": "a", "max_tokens": -1}),
            "invalid_value",
            "max_tokens",
        ),
        (
            json!({"prompt": "a", "temperature": 2.5}),
            "invalid_value",
            "temperature",
        ),
        (
            json!({"prompt": "a", "temperature": 1e300}),
            "invalid_value",
            "temperature",
        ),
        (json!({"prompt": "a", "top_p": 0}), "invalid_value", "top_p"),
        (json!({"prompt": "a", "n": 0}), "invalid_value", "n"),
        (json!({"prompt": "a", "n": 129}), "invalid_value", "n"),
        (json!({"prompt": "a", "stop": ""}), "invalid_value", "stop"),
        (
            json!({"prompt": "a", "logprobs": 1}),
            "unsupported_parameter",
            "logprobs",
        ),
        (
            json!({"prompt": "a", "nonsense": 1}),
            "unknown_parameter",
            "nonsense",
        ),
        (
            json!({"prompt": "a", "max_tokens": 2_000_000}),
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            json!({"prompt": "a b", "max_tokens": 1_048_575}),
            "context_length_exceeded",
            "prompt",
        ),
        (
            json!({"prompt": "a", "stop": "x".repeat(1_025)}),
            "invalid_value",
            "stop",
        ),
        (
            json!({"prompt": "a", "model": "m".repeat(20_000)}),
            "invalid_value",
            "model",
        ),
    ] {
        let expected = refused(400, code, Some(param));
        assert_eq!(
            refusal(&server, completion(&body)).await,
            expected,
            "{body}"
        );
    }
}

#[tokio::test]
async fn bad_messages_are_refused_with_their_field() {
    let server = Setup::test_runner(full_speed()).start().await;
    let invalid = |change: fn(&mut v1::CompletionRequest)| {
        let mut request = grpc::request("a", 5);
        change(&mut request);
        request
    };
    for (request, kind, param) in [
        (
            invalid(|r| r.input = None),
            ErrorKind::MissingParameter,
            "prompt",
        ),
        (
            invalid(|r| r.max_tokens = Some(0)),
            ErrorKind::InvalidValue,
            "max_tokens",
        ),
        (
            invalid(|r| r.temperature = Some(f32::NAN)),
            ErrorKind::InvalidValue,
            "temperature",
        ),
        (
            invalid(|r| r.logprobs = Some(1)),
            ErrorKind::UnsupportedParameter,
            "logprobs",
        ),
        (
            invalid(|r| r.max_tokens = Some(2_000_000)),
            ErrorKind::ContextLengthExceeded,
            "max_tokens",
        ),
        (
            invalid(|r| r.model = "m".repeat(20_000)),
            ErrorKind::InvalidValue,
            "model",
        ),
        (
            invalid(|r| r.stop = vec!["x".repeat(1_025)]),
            ErrorKind::InvalidValue,
            "stop",
        ),
    ] {
        let (code, error) = grpc_error(&server, request).await;
        assert_eq!((code, error.kind), (Code::InvalidArgument, kind));
        assert_eq!(error.param.as_deref(), Some(param));
    }
    let mut request = grpc::request("a", 5);
    request.model = "nobody".to_owned();
    let (code, error) = grpc_error(&server, request).await;
    assert_eq!(
        (code, error.kind),
        (Code::NotFound, ErrorKind::ModelNotFound)
    );
    let (code, _) = grpc_error(&server, grpc::request(&"a".repeat(5 << 20), 5)).await;
    assert_eq!(code, Code::OutOfRange);
}

#[tokio::test]
async fn paths_methods_types_and_sizes_are_refused_with_the_error_object() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"prompt": "a", "stream": true});
    let unknown_model = completion(&json!({"prompt": "a", "model": "nobody"}));
    for (request, expected) in [
        (
            unknown_model,
            refused(404, "model_not_found", Some("model")),
        ),
        (
            get("/v1/models/nobody"),
            refused(404, "model_not_found", Some("model")),
        ),
        (
            get("/v1/models/%ff"),
            refused(404, "model_not_found", Some("model")),
        ),
        (get("/v1/nothing"), refused(404, "not_found", None)),
        (get("/../../etc/passwd"), refused(404, "not_found", None)),
        (
            get("/v1/completions"),
            refused(405, "method_not_allowed", None),
        ),
        (
            post("/v1/models", "{}"),
            refused(405, "method_not_allowed", None),
        ),
        (
            completion(&body).accept("text/html"),
            refused(406, "not_acceptable", None),
        ),
        (
            completion(&body).header("content-type", "text/plain"),
            refused(415, "unsupported_media_type", None),
        ),
        (
            completion(&body).without_header("content-type"),
            refused(415, "unsupported_media_type", None),
        ),
        (
            // Refused by its declared length, before any of it is read.
            completion(&body).header("content-length", "67108864"),
            refused(413, "request_too_large", None),
        ),
        (
            post("/v1/completions", vec![b' '; 5 << 20]),
            refused(413, "request_too_large", None),
        ),
        (
            completion(&body).header("x-request-id", &"x".repeat(200)),
            refused(400, "invalid_value", Some("x-request-id")),
        ),
    ] {
        assert_eq!(refusal(&server, request).await, expected);
    }
    let headers = completion(&body).header("x-large", &"x".repeat(1 << 20));
    assert_eq!(headers.send(&server).await.status, 431);
}

#[tokio::test]
async fn models_are_listed_and_described() {
    let server = Setup::test_runner(full_speed()).start().await;
    let (_, body) = get("/v1/models").fetch(&server).await;
    let list = body.json();
    let created = list["data"][0]["created"].clone();
    let model = json!({
        "id": "llm_test", "object": "model", "created": created, "owned_by": "tokenway",
        "max_model_len": 1_048_576,
    });
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    let (_, body) = get("/v1/models/llm_test").fetch(&server).await;
    assert_eq!(body.json(), model);
}

/// A loader that waits for a word before each load; no word is a failure.
struct Waiting {
    loader: TestRunnerLoader,
    word: Mutex<mpsc::Receiver<()>>,
    loads: AtomicUsize,
}

impl Loader for Waiting {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<Loaded, LoadError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let word = self.word.lock().expect("no load panics").recv();
        word.map_err(|_| LoadError("there is no device any more".to_owned()))?;
        self.loader.load(slots, progress)
    }

    fn name(&self) -> &'static str {
        "llm_test"
    }
}

fn waiting(options: TestRunnerOptions) -> (Setup, mpsc::Sender<()>) {
    let (word, receiver) = mpsc::channel();
    let loader = Waiting {
        loader: TestRunnerLoader::new(options),
        word: Mutex::new(receiver),
        loads: AtomicUsize::new(0),
    };
    (Setup::runner("llm_test", Arc::new(loader), 4), word)
}

#[tokio::test]
async fn a_server_that_loads_says_not_ready_and_when_to_retry() {
    let (setup, word) = waiting(full_speed());
    let server = setup.start_loading().await;
    let not_ready = refused(503, "not_ready", None);
    for request in [
        completion(&json!({"prompt": "a"})),
        get("/readyz"),
        get("/health"),
    ] {
        assert_eq!(refusal(&server, request).await, not_ready);
    }
    assert_eq!(get("/livez").fetch(&server).await.0.status, 200);
    let (code, error) = grpc_error(&server, grpc::request("a", 5)).await;
    assert_eq!((code, error.kind), (Code::Unavailable, ErrorKind::NotReady));
    assert!(error.retry_after.is_some());
    word.send(()).unwrap();
    server.loaded().await;
    let (_, body) = get("/health").fetch(&server).await;
    assert_eq!(body.json(), json!({"status": "healthy"}));
    drop(word);
}

#[tokio::test]
async fn a_worker_that_crashes_loses_its_streams_with_an_error_and_is_then_missing() {
    let panic_at = |index| TestRunnerOptions {
        panic_at: Some(index),
        ..full_speed()
    };
    let (setup, word) = waiting(panic_at(2));
    word.send(()).unwrap();
    let server = setup.start().await;
    drop(word);
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let (response, body) = completion(&body).fetch(&server).await;
    assert_eq!((response.status, body.end), (200, End::Unclean));
    let record = body.lines().pop().expect("a record");
    assert_eq!(record["error"]["code"], "worker_lost");
    assert_eq!(record["error"]["retryable"], true);
    // It cannot load its model again, so from here on there is none.
    server.failed().await;
    let (code, error) = grpc_error(&server, grpc::request("a", 5)).await;
    assert_eq!((code, error.kind), (Code::Unavailable, ErrorKind::NoWorker));
    assert_eq!(get("/readyz").fetch(&server).await.0.status, 503);
    let counts = server.drain().await;
    counts.assert_nothing_is_left();
    assert_eq!(counts.get("tokenway_workers_lost_total"), 1.0);
}

#[tokio::test]
async fn a_worker_that_crashed_loads_its_model_again_and_serves_on() {
    let options = TestRunnerOptions {
        panic_at: Some(2),
        ..full_speed()
    };
    let (setup, word) = waiting(options);
    word.send(()).unwrap();
    word.send(()).unwrap();
    let server = setup.start().await;
    let stream = server
        .grpc()
        .await
        .complete(grpc::request("a", 5))
        .await
        .unwrap()
        .into_inner();
    let lost = grpc::collect(stream).await;
    assert_eq!(
        Error::from(&lost.error.expect("an error")).kind,
        ErrorKind::WorkerLost
    );
    server.restarted().await;
    let stream = server
        .grpc()
        .await
        .complete(grpc::request("a", 2))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(grpc::collect(stream).await.usage().completion_tokens, 2);
    server.drain().await.assert_nothing_is_left();
}

#[tokio::test]
async fn a_model_that_fails_on_one_request_fails_that_request_alone() {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    let server = Setup::test_runner(options).start().await;
    let unary = completion(&json!({"prompt": "a", "max_tokens": 5}));
    assert_eq!(
        refusal(&server, unary).await,
        refused(500, "internal_error", None)
    );
    let stream = server
        .grpc()
        .await
        .complete(grpc::request("a", 5))
        .await
        .unwrap()
        .into_inner();
    let failed = grpc::collect(stream).await;
    assert_eq!(
        failed.texts(0).len(),
        3,
        "what came before the failure is told"
    );
    assert_eq!(failed.error.expect("an error").code(), Code::Internal);
    let stream = server
        .grpc()
        .await
        .complete(grpc::request("a", 3))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(grpc::collect(stream).await.usage().completion_tokens, 3);
}

#[tokio::test]
async fn an_engine_that_goes_away_under_a_gateway_is_an_upstream_error() {
    let abandoned = Duration::from_millis(1);
    let engine = Setup::test_runner(silent_at(2))
        .drain(Duration::ZERO, abandoned)
        .start()
        .await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let mut response = completion(&body).send(&gateway).await;
    assert!(response.line().await.is_some());
    assert!(response.line().await.is_some());
    engine.drain().await;
    let record: Value = response.json_line().await.expect("a record");
    assert_eq!(record["error"]["code"], "draining");
    assert_eq!(record["error"]["tokens_delivered"], 2);
    assert_eq!(response.rest().await.end, End::Unclean);
    // Nobody is left to ask.
    let (status, code, _) = refusal(&gateway, completion(&body)).await;
    assert_eq!((status, code.as_str()), (503, "no_worker"));
    gateway.drain().await.assert_nothing_is_left();
}

#[tokio::test]
async fn a_server_that_drains_refuses_new_work_and_ends_what_takes_too_long() {
    let setup = Setup::test_runner(every(Duration::from_millis(5)));
    let grace = Duration::from_secs(1);
    let server = setup.drain(grace, Duration::from_millis(100)).start().await;
    let short = json!({"prompt": "a", "max_tokens": 20, "stream": true});
    let long = json!({"prompt": "a", "max_tokens": 100_000, "stream": true});
    let mut short = completion(&short).send(&server).await;
    let mut long = completion(&long).send(&server).await;
    assert!(short.line().await.is_some() && long.line().await.is_some());
    let client = server.grpc().await;
    let address = server.http_address();
    let draining = tokio::spawn(server.drain());
    let refused_in_grace = async {
        loop {
            let answer = client.clone().complete(grpc::request("a", 1)).await;
            match answer {
                Ok(stream) => drop(grpc::collect(stream.into_inner()).await),
                Err(status) => return Error::from(&status).kind,
            }
        }
    };
    assert_eq!(refused_in_grace.await, ErrorKind::Draining);
    assert_eq!(short.rest().await.end, End::Clean);
    let long = long.rest().await;
    assert_eq!(long.end, End::Unclean);
    let record = long.lines().pop().expect("a record");
    assert_eq!(record["error"]["code"], "draining");
    draining.await.unwrap().assert_nothing_is_left();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
