//! What clients are told while a worker loads its model, when it crashes, and when the model fails.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::json;
use support::grpc::grpc_error;
use support::http::{End, completion, get, refusal, refused};
use support::{Counts, Setup, full_speed, grpc};
use tokenway::error::{Error, ErrorKind};
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, LoadedModel, Loader, ModelError, Next, Runner, Sequence, Slot, SlotCredit, Step,
    StepError,
};
use tonic::Code;

/// A loader that waits for a word before each load; no word is a failure.
struct Waiting {
    loader: TestRunnerLoader,
    word: Mutex<mpsc::Receiver<()>>,
    loads: AtomicUsize,
}

impl Loader for Waiting {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
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
    let (_, body) = get("/readyz").fetch(&server).await;
    let ready = json!({"status": "ready", "workers": {"ready": 1}});
    assert_eq!(body.json(), ready);
    let ready = Counts::now(&server).get("tokenway_workers{state=\"ready\"}");
    assert_eq!(ready, 1.0);
    drop(word);
}

#[tokio::test]
async fn a_model_that_loads_or_has_no_worker_refuses_its_own_requests_alone() {
    let panic_at = TestRunnerOptions {
        panic_at: Some(0),
        ..full_speed()
    };
    let (setup, word) = waiting(panic_at);
    let server = setup
        .without_resumption()
        .and_model("other", full_speed())
        .start_loading()
        .await;
    let ask = |model: &str| completion(&json!({"prompt": "a", "model": model, "max_tokens": 1}));
    let health = || async { refusal(&server, get("/health")).await };
    server.loaded_so_far(0.5).await;
    assert_eq!(
        refusal(&server, ask("llm_test")).await,
        refused(503, "not_ready", None)
    );
    assert_eq!(ask("other").fetch(&server).await.0.status, 200);
    assert_eq!(health().await, refused(503, "not_ready", None));
    word.send(()).unwrap();
    server.loaded().await;
    assert_eq!(get("/health").fetch(&server).await.0.status, 200);
    let lost = ask("llm_test").fetch(&server).await.1;
    assert_eq!(lost.error().0, "worker_lost");
    server.not_ready().await;
    assert_eq!(
        refusal(&server, ask("llm_test")).await,
        refused(503, "no_worker", None)
    );
    assert_eq!(ask("other").fetch(&server).await.0.status, 200);
    assert_eq!(health().await, refused(503, "no_worker", None));
    let (_, health) = get("/readyz").fetch(&server).await;
    assert!(health.text.contains("'llm_test'"), "{}", health.text);
    drop(word);
    server.failed().await;
    assert_eq!(ask("other").fetch(&server).await.0.status, 200);
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_is_named_where_the_server_ends_for_it() {
    let (setup, word) = waiting(full_speed());
    drop(word);
    let server = setup.and_model("other", full_speed()).start_loading().await;
    let failure = server.ready().await.expect_err("it cannot be loaded");
    assert_eq!(
        failure.to_string(),
        "cannot load the model 'llm_test': there is no device any more"
    );
}

#[tokio::test]
async fn a_worker_that_crashes_loses_its_streams_with_an_error_and_is_then_missing() {
    let panic_at = |index| TestRunnerOptions {
        panic_at: Some(index),
        ..full_speed()
    };
    let (setup, word) = waiting(panic_at(2));
    word.send(()).unwrap();
    let server = setup.without_resumption().start().await;
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
    let server = setup.without_resumption().start().await;
    let lost = grpc::collect(server.stream(grpc::request("a", 5)).await).await;
    assert_eq!(
        Error::from(&lost.error.expect("an error")).kind,
        ErrorKind::WorkerLost
    );
    server.restarted().await;
    let after = grpc::collect(server.stream(grpc::request("a", 2)).await).await;
    assert_eq!(after.usage().completion_tokens, 2);
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
    let failed = grpc::collect(server.stream(grpc::request("a", 5)).await).await;
    assert_eq!(
        failed.texts(0).len(),
        3,
        "what came before the failure is told"
    );
    assert_eq!(failed.error.expect("an error").code(), Code::Internal);
    let after = grpc::collect(server.stream(grpc::request("a", 3)).await).await;
    assert_eq!(after.usage().completion_tokens, 3);
}

/// The test runner on a device whose calls do not return before somebody lets them.
struct Hanging {
    loader: TestRunnerLoader,
    word: Arc<Mutex<mpsc::Receiver<()>>>,
}

struct HangingRunner {
    runner: Box<dyn Runner>,
    word: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Loader for Hanging {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.loader.load(slots, progress)?;
        let word = Arc::clone(&self.word);
        let runner = Box::new(HangingRunner { runner, word });
        Ok(LoadedModel { model, runner })
    }

    fn name(&self) -> &'static str {
        "llm_test"
    }
}

impl Runner for HangingRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError> {
        self.runner.admit(slot, sequence)
    }

    fn release(&mut self, slot: Slot) {
        self.runner.release(slot);
    }

    fn next(&mut self, credit: &dyn SlotCredit) -> Next {
        self.runner.next(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        // Once nobody can say it any more, no call waits for it.
        let _ = self.word.lock().expect("no call panics").recv();
        self.runner.step(step)
    }
}

#[tokio::test]
async fn a_device_that_does_not_return_is_not_ready_until_it_does_and_its_streams_go_on() {
    let (word, receiver) = mpsc::channel();
    let loader = Hanging {
        loader: TestRunnerLoader::new(full_speed()),
        word: Arc::new(Mutex::new(receiver)),
    };
    let mut setup = Setup::runner("llm_test", Arc::new(loader), 4);
    setup.engine().workers.patience.step_limit = Some(Duration::from_millis(50));
    let server = setup.start().await;
    let stream = server.stream(grpc::request("a", 3)).await;
    server.not_ready().await;
    let no_worker = refused(503, "no_worker", None);
    assert_eq!(refusal(&server, get("/readyz")).await, no_worker);
    let request = completion(&json!({"prompt": "a"}));
    assert_eq!(refusal(&server, request).await, no_worker);
    drop(word);
    server.loaded().await;
    assert_eq!(grpc::collect(stream).await.usage().completion_tokens, 3);
}
