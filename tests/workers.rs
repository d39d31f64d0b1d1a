//! The errors that clients get while a worker loads its model, after the worker has crashed, and when the model
//! fails.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::json;
use support::grpc::grpc_error;
use support::http::{BodyEnd, completion, expected_error, get, http_error};
use support::metrics::MetricsSnapshot;
use support::{Setup, full_speed, grpc};
use tokenway::error::{Error, ErrorKind};
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, LoadedModel, Loader, ModelError, NextStep, Runner, Sequence, SequenceStart, Slot,
    SlotCredit, Step, StepError,
};
use tonic::Code;

/// A loader that waits for a permit before each load. If the test drops the sender of permits, the load fails.
struct PermitLoader {
    loader: TestRunnerLoader,
    permits: Mutex<mpsc::Receiver<()>>,
    loads: AtomicUsize,
}

impl Loader for PermitLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let permit = self.permits.lock().expect("no load panics").recv();
        permit.map_err(|_| LoadError("there is no device any more".to_owned()))?;
        self.loader.load(slots, progress)
    }

    fn name(&self) -> &'static str {
        "llm_test"
    }
}

fn load_on_permit(options: TestRunnerOptions) -> (Setup, mpsc::Sender<()>) {
    let (permits, receiver) = mpsc::channel();
    let loader = PermitLoader {
        loader: TestRunnerLoader::new(options),
        permits: Mutex::new(receiver),
        loads: AtomicUsize::new(0),
    };
    (Setup::runner("llm_test", Arc::new(loader), 4), permits)
}

#[tokio::test]
async fn a_loading_server_is_not_ready_and_says_when_to_retry() {
    let (setup, permits) = load_on_permit(full_speed());
    let server = setup.start_loading().await;
    let not_ready = expected_error(503, "not_ready", None);
    for request in [
        completion(&json!({"prompt": "a"})),
        get("/readyz"),
        get("/health"),
    ] {
        assert_eq!(http_error(&server, request).await, not_ready);
    }
    assert_eq!(get("/livez").fetch(&server).await.0.status, 200);
    let (code, error) = grpc_error(&server, grpc::request("a", 5)).await;
    assert_eq!((code, error.kind), (Code::Unavailable, ErrorKind::NotReady));
    assert!(error.retry_after.is_some());
    permits.send(()).unwrap();
    server.wait_until_loaded().await;
    let (_, body) = get("/health").fetch(&server).await;
    assert_eq!(body.json(), json!({"status": "healthy"}));
    let (_, body) = get("/readyz").fetch(&server).await;
    let ready = json!({"status": "ready", "workers": {"ready": 1}});
    assert_eq!(body.json(), ready);
    let ready = MetricsSnapshot::take(&server).get("tokenway_workers{state=\"ready\"}");
    assert_eq!(ready, 1.0);
    drop(permits);
}

#[tokio::test]
async fn an_unavailable_model_rejects_only_its_own_requests() {
    let panic_at = TestRunnerOptions {
        panic_at: Some(0),
        ..full_speed()
    };
    let (setup, permits) = load_on_permit(panic_at);
    let server = setup
        .without_resumption()
        .with_model("other", full_speed())
        .start_loading()
        .await;
    let request =
        |model: &str| completion(&json!({"prompt": "a", "model": model, "max_tokens": 1}));
    let health = || async { http_error(&server, get("/health")).await };
    server.wait_until_loaded_fraction(0.5).await;
    assert_eq!(
        http_error(&server, request("llm_test")).await,
        expected_error(503, "not_ready", None)
    );
    assert_eq!(request("other").fetch(&server).await.0.status, 200);
    assert_eq!(health().await, expected_error(503, "not_ready", None));
    permits.send(()).unwrap();
    server.wait_until_loaded().await;
    assert_eq!(get("/health").fetch(&server).await.0.status, 200);
    let lost = request("llm_test").fetch(&server).await.1;
    assert_eq!(lost.error().0, "worker_lost");
    server.wait_until_not_ready().await;
    assert_eq!(
        http_error(&server, request("llm_test")).await,
        expected_error(503, "no_worker", None)
    );
    assert_eq!(request("other").fetch(&server).await.0.status, 200);
    assert_eq!(health().await, expected_error(503, "no_worker", None));
    let (_, health) = get("/readyz").fetch(&server).await;
    assert!(health.text.contains("'llm_test'"), "{}", health.text);
    drop(permits);
    server.wait_until_load_failed().await;
    assert_eq!(request("other").fetch(&server).await.0.status, 200);
}

#[tokio::test]
async fn a_load_failure_names_the_model() {
    let (setup, permits) = load_on_permit(full_speed());
    drop(permits);
    let server = setup
        .with_model("other", full_speed())
        .start_loading()
        .await;
    let failure = server
        .ready()
        .await
        .expect_err("the model cannot be loaded");
    assert_eq!(
        failure.to_string(),
        "cannot load the model 'llm_test': there is no device any more"
    );
}

#[tokio::test]
async fn a_crashed_worker_that_cannot_reload_leaves_no_worker() {
    let panic_at = |index| TestRunnerOptions {
        panic_at: Some(index),
        ..full_speed()
    };
    let (setup, permits) = load_on_permit(panic_at(2));
    permits.send(()).unwrap();
    let server = setup.without_resumption().start().await;
    drop(permits);
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let (response, body) = completion(&body).fetch(&server).await;
    assert_eq!((response.status, body.end), (200, BodyEnd::Unclean));
    let record = body.lines().pop().expect("an error record");
    assert_eq!(record["error"]["code"], "worker_lost");
    assert_eq!(record["error"]["retryable"], true);
    // The worker cannot load its model again, so the model has no worker.
    server.wait_until_load_failed().await;
    let (code, error) = grpc_error(&server, grpc::request("a", 5)).await;
    assert_eq!((code, error.kind), (Code::Unavailable, ErrorKind::NoWorker));
    assert_eq!(get("/readyz").fetch(&server).await.0.status, 503);
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.get("tokenway_workers_lost_total"), 1.0);
}

#[tokio::test]
async fn a_crashed_worker_reloads_its_model() {
    let options = TestRunnerOptions {
        panic_at: Some(2),
        ..full_speed()
    };
    let (setup, permits) = load_on_permit(options);
    permits.send(()).unwrap();
    permits.send(()).unwrap();
    let server = setup.without_resumption().start().await;
    let lost = grpc::collect(server.stream(grpc::request("a", 5)).await).await;
    assert_eq!(
        Error::from(&lost.error.expect("an error")).kind,
        ErrorKind::WorkerLost
    );
    server.wait_until_restarted().await;
    let after = grpc::collect(server.stream(grpc::request("a", 2)).await).await;
    assert_eq!(after.usage().completion_tokens, 2);
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_model_failure_affects_only_its_own_request() {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    let server = Setup::test_runner(options).start().await;
    let unary = completion(&json!({"prompt": "a", "max_tokens": 5}));
    assert_eq!(
        http_error(&server, unary).await,
        expected_error(500, "internal_error", None)
    );
    let failed = grpc::collect(server.stream(grpc::request("a", 5)).await).await;
    assert_eq!(
        failed.texts(0).len(),
        3,
        "the tokens before the failure are sent"
    );
    assert_eq!(failed.error.expect("an error").code(), Code::Internal);
    let after = grpc::collect(server.stream(grpc::request("a", 3)).await).await;
    assert_eq!(after.usage().completion_tokens, 3);
}

/// A test runner whose device calls return only when the test permits it.
struct HangingLoader {
    loader: TestRunnerLoader,
    permits: Arc<Mutex<mpsc::Receiver<()>>>,
}

struct HangingRunner {
    runner: Box<dyn Runner>,
    permits: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Loader for HangingLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.loader.load(slots, progress)?;
        let permits = Arc::clone(&self.permits);
        let runner = Box::new(HangingRunner { runner, permits });
        Ok(LoadedModel { model, runner })
    }

    fn name(&self) -> &'static str {
        "llm_test"
    }
}

impl Runner for HangingRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.runner.admit(slot, sequence)
    }

    fn release(&mut self, slot: Slot) {
        self.runner.release(slot);
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        self.runner.next_step(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        // If the test drops the sender, the call fails at once instead of waiting.
        let _ = self.permits.lock().expect("no call panics").recv();
        self.runner.step(step)
    }
}

#[tokio::test]
async fn a_hung_device_is_not_ready_until_it_returns_and_keeps_its_streams() {
    let (permits, receiver) = mpsc::channel();
    let loader = HangingLoader {
        loader: TestRunnerLoader::new(full_speed()),
        permits: Arc::new(Mutex::new(receiver)),
    };
    let mut setup = Setup::runner("llm_test", Arc::new(loader), 4);
    setup.engine().workers.timeouts.step_limit = Some(Duration::from_millis(50));
    let server = setup.start().await;
    let stream = server.stream(grpc::request("a", 3)).await;
    server.wait_until_not_ready().await;
    let no_worker = expected_error(503, "no_worker", None);
    assert_eq!(http_error(&server, get("/readyz")).await, no_worker);
    let request = completion(&json!({"prompt": "a"}));
    assert_eq!(http_error(&server, request).await, no_worker);
    drop(permits);
    server.wait_until_loaded().await;
    assert_eq!(grpc::collect(stream).await.usage().completion_tokens, 3);
}
