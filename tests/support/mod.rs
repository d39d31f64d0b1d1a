//! What the tests share: a server on free ports, and clients of both doors.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokenway::gateway::UnknownFields;
use tokenway::listen::{Address, Limits};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{LoadError, LoadedModel, Loader};
use tokenway::scheduler::{Readiness, UnknownModel};
use tokenway::server::{
    Drain, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    StartError, WorkerParts,
};
use tokenway::telemetry::Telemetry;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{IntoRequest, Streaming};

pub mod foreign_server;
pub mod frames;
pub mod gguf;
pub mod grpc;
pub mod http;
pub mod http2;
pub mod program;

/// Where the real model's file is.
pub fn model_path() -> PathBuf {
    let path = std::env::var_os("TOKENWAY_TEST_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/tokenway/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "there is no model at {}: `make model` fetches it",
        path.display()
    );
    path
}

/// A server that the tests of one process share, because loading a model takes its time. It lasts as long as any test
/// holds it, and not until the process ends: a device that computes while the process exits would crash it.
pub struct SharedServer(Option<(Runtime, TestServer)>);

impl SharedServer {
    /// The server that `kept` knows, or a new one.
    pub fn get(kept: &Mutex<Weak<Self>>, setup: impl FnOnce() -> Setup + Send) -> Arc<Self> {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = kept.upgrade() {
            return shared;
        }
        let started = apart(|| {
            let runtime = Runtime::new().expect("a runtime");
            let server = runtime.block_on(setup().start());
            (runtime, server)
        });
        let shared = Arc::new(Self(Some(started)));
        *kept = Arc::downgrade(&shared);
        shared
    }
}

impl Deref for SharedServer {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.0.as_ref().expect("it is there until the end").1
    }
}

impl Drop for SharedServer {
    fn drop(&mut self) {
        let Some((runtime, server)) = self.0.take() else {
            return;
        };
        apart(move || {
            drop(server);
            drop(runtime);
        });
    }
}

/// A runtime can neither be entered nor dropped within a test's own.
fn apart<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let done = scope.spawn(what).join();
        done.expect("it does not panic")
    })
}

/// A server that runs until the test ends.
pub struct TestServer {
    server: Server,
}

/// What is to be served, and how.
#[derive(Clone)]
pub struct Setup {
    pub parts: ServerParts,
}

/// The test runner as fast as its reader.
pub fn full_speed() -> TestRunnerOptions {
    every(Duration::ZERO)
}

/// The test runner at a cadence.
pub fn every(interval: Duration) -> TestRunnerOptions {
    TestRunnerOptions {
        interval,
        ..TestRunnerOptions::default()
    }
}

/// The test runner, silent from this token on.
pub fn silent_at(index: u32) -> TestRunnerOptions {
    TestRunnerOptions {
        silent_at: Some(index),
        ..full_speed()
    }
}

impl Setup {
    /// The test runner behind both doors.
    pub fn test_runner(options: TestRunnerOptions) -> Self {
        Self::runner("llm_test", Arc::new(TestRunnerLoader::new(options)), 1024)
    }

    /// A model that cannot be loaded.
    pub fn unloadable() -> Self {
        Self::runner("llm_test", Arc::new(Unloadable), 1)
    }

    /// Any runner behind both doors.
    pub fn runner(name: &str, loader: Arc<dyn Loader>, slots: usize) -> Self {
        let loopback = || Address::Tcp("127.0.0.1:0".to_owned());
        let engine = EngineParts {
            models: vec![model(name, loader, slots)],
            unknown_model: UnknownModel::Refuse,
            workers: WorkerParts::default(),
        };
        Self {
            parts: ServerParts {
                source: Source::Engine(engine),
                http: Some(HttpFrontend::at(loopback())),
                grpc: Some(loopback()),
                limits: Limits::default(),
                request_timeout: Duration::from_secs(60),
                drain: Drain {
                    grace: Duration::ZERO,
                    timeout: Duration::from_secs(10),
                },
            },
        }
    }

    /// A gateway in front of other servers' gRPC doors.
    pub fn gateway(engines: &[&TestServer]) -> Self {
        let addresses = engines.iter().map(|engine| engine.grpc_url()).collect();
        let mut setup = Self::test_runner(full_speed());
        setup.parts.source = Source::Remote(addresses);
        setup.parts.grpc = None;
        setup
    }

    pub fn engine(&mut self) -> &mut EngineParts {
        match &mut self.parts.source {
            Source::Engine(engine) => engine,
            Source::Remote(_) => panic!("this server has no engine"),
        }
    }

    /// Another model besides, on the test runner.
    pub fn and_model(mut self, name: &str, options: TestRunnerOptions) -> Self {
        let loader = Arc::new(TestRunnerLoader::new(options));
        self.engine().models.push(model(name, loader, 1024));
        self
    }

    /// Requests for a model that is not served take the first.
    pub fn any_model(mut self) -> Self {
        self.engine().unknown_model = UnknownModel::First;
        self
    }

    /// Fields that are unknown are ignored.
    pub fn ignoring_unknown_fields(mut self) -> Self {
        self.http().unknown_fields = UnknownFields::Ignore;
        self
    }

    /// A streamed request that waits for so long gets its headers.
    pub fn headers_after(mut self, after: Duration) -> Self {
        self.http().headers_after = Some(after);
        self
    }

    fn http(&mut self) -> &mut HttpFrontend {
        self.parts.http.as_mut().expect("it has the HTTP API")
    }

    /// A choice whose worker is lost ends with it.
    pub fn without_resumption(mut self) -> Self {
        self.engine().workers.resumption.max_consecutive = 0;
        self
    }

    pub fn slots(mut self, slots: usize) -> Self {
        self.engine().models[0].slots = slots;
        self
    }

    pub fn queue_depth(mut self, queue_depth: usize) -> Self {
        self.engine().models[0].queue_depth = queue_depth;
        self
    }

    pub fn slow_reader_timeout(mut self, timeout: Duration) -> Self {
        self.engine().models[0].slow_reader_timeout = timeout;
        self
    }

    pub fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.parts.limits);
        self
    }

    pub fn drain(mut self, grace: Duration, timeout: Duration) -> Self {
        self.parts.drain = Drain { grace, timeout };
        self
    }

    /// Starts the server and waits until its model is loaded. A gateway has none, and its engines may
    /// be whatever the test wants.
    pub async fn start(self) -> TestServer {
        let has_engine = matches!(self.parts.source, Source::Engine(_));
        let server = self.start_loading().await;
        if has_engine {
            server.ready().await.expect("the model loads");
        }
        server
    }

    /// Starts the server without waiting.
    pub async fn start_loading(self) -> TestServer {
        TestServer {
            server: Server::start(self.parts).await.expect("the server starts"),
        }
    }
}

impl TestServer {
    /// Waits until the model is loaded, or says why it cannot be.
    pub async fn ready(&self) -> Result<(), StartError> {
        self.server.ready(|_| ()).await
    }

    pub fn http_address(&self) -> String {
        self.server
            .http_address()
            .expect("it has an HTTP door")
            .to_string()
    }

    pub fn http_url(&self) -> String {
        format!("http://{}", self.http_address())
    }

    pub fn grpc_address(&self) -> String {
        self.server
            .grpc_address()
            .expect("it has a gRPC door")
            .to_string()
    }

    pub fn grpc_url(&self) -> String {
        format!("http://{}", self.grpc_address())
    }

    pub async fn grpc(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(self.grpc_url())
            .await
            .expect("the gRPC door answers")
    }

    /// Asks the gRPC door for a completion, and waits until it is admitted.
    pub async fn stream(
        &self,
        request: impl IntoRequest<v1::CompletionRequest>,
    ) -> Streaming<v1::CompletionEvent> {
        let answer = self.grpc().await.complete(request).await;
        answer.expect("the request is admitted").into_inner()
    }

    pub fn telemetry(&self) -> &Telemetry {
        self.server.telemetry()
    }

    /// Waits until the model is loaded.
    pub async fn loaded(&self) {
        self.server.ready(|_| ()).await.expect("the model loads");
    }

    /// Waits until so much of all models together is loaded, and not all.
    pub async fn loaded_so_far(&self, fraction: f32) {
        let mut readiness = self.server.readiness().expect("it has an engine");
        let so_far = |readiness: &Readiness| *readiness == Readiness::Loading(fraction);
        readiness.wait_for(so_far).await.expect("the engine runs");
    }

    /// Waits until the model cannot be loaded.
    pub async fn failed(&self) {
        let mut readiness = self.server.readiness().expect("it has an engine");
        let failed = |readiness: &Readiness| matches!(readiness, Readiness::Failed { .. });
        readiness.wait_for(failed).await.expect("the engine runs");
    }

    /// Waits until not every model has a worker that is up.
    pub async fn not_ready(&self) {
        let mut readiness = self.server.readiness().expect("it has an engine");
        let lost = |readiness: &Readiness| *readiness != Readiness::Ready;
        readiness.wait_for(lost).await.expect("the engine runs");
    }

    /// Waits until a worker that was lost is back.
    pub async fn restarted(&self) {
        self.not_ready().await;
        let mut readiness = self.server.readiness().expect("it has an engine");
        let ready = |readiness: &Readiness| *readiness == Readiness::Ready;
        readiness.wait_for(ready).await.expect("the engine runs");
    }

    /// Ends the server; what it counted is left.
    pub async fn drain(self) -> Counts {
        let telemetry = self.server.telemetry().clone();
        self.server.drain().await;
        Counts(telemetry.render())
    }
}

fn model(name: &str, loader: Arc<dyn Loader>, slots: usize) -> ModelParts {
    ModelParts {
        name: name.to_owned(),
        aliases: Vec::new(),
        loader,
        workers: 1,
        isolation: Isolation::Thread,
        slots,
        queue_depth: 1024,
        slow_reader_timeout: Duration::from_secs(10),
    }
}

struct Unloadable;

impl Loader for Unloadable {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        Err(LoadError("its file is missing".to_owned()))
    }

    fn name(&self) -> &'static str {
        "unloadable"
    }
}

/// A server's metrics at one moment.
#[derive(Debug)]
pub struct Counts(pub String);

impl Counts {
    /// What a server has counted so far.
    pub fn now(server: &TestServer) -> Self {
        Self(server.telemetry().render())
    }

    /// A metric by its name with its labels, as they are written; 0 where it was never counted.
    pub fn get(&self, metric: &str) -> f64 {
        let value = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().expect("a metric is a number"))
    }

    /// Every gauge of running work must be back at zero when a server has ended.
    pub fn assert_nothing_is_left(&self) {
        for gauge in [
            "tokenway_requests_in_flight{api=\"grpc\"}",
            "tokenway_requests_in_flight{api=\"http\"}",
            "tokenway_requests_lingering{api=\"grpc\"}",
            "tokenway_requests_lingering{api=\"http\"}",
            "tokenway_connections_open{listener=\"grpc\"}",
            "tokenway_connections_open{listener=\"http\"}",
            "tokenway_sequences_running",
            "tokenway_requests_queued",
            "tokenway_workers{state=\"ready\"}",
        ] {
            assert_eq!(self.get(gauge), 0.0, "{gauge}\n{}", self.0);
        }
    }
}
