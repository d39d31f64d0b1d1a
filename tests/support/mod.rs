//! Helpers for the integration tests: a server on free ports, and clients of the HTTP and gRPC APIs.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file is its own crate and uses only some of these helpers"
)]

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokenway::cluster::{RoutePolicy, RouteSpec, TargetSpec};
use tokenway::gateway::UnknownFieldPolicy;
use tokenway::listen::{Address, Limits};
use tokenway::models::{Readiness, UnknownModelPolicy};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{LoadError, LoadedModel, Loader};
use tokenway::server::{
    DrainDurations, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    StartError, WorkerParts,
};
use tokenway::telemetry::Telemetry;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{IntoRequest, Streaming};

pub mod certificates;
pub mod foreign_server;
pub mod frames;
pub mod gguf;
pub mod grpc;
pub mod http;
pub mod http2;
#[cfg(feature = "llama-cpp")]
pub mod hub;
pub mod keys;
pub mod log;
pub mod metrics;
pub mod openai_engine;
pub mod program;
pub mod running_program;
pub mod story;
pub mod tls_server;
pub mod vllm_engine;

use metrics::MetricsSnapshot;

/// Returns the path of the real model's GGUF file.
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
        "no model file at {}: run `make model` to download it",
        path.display()
    );
    path
}

/// A server that the tests of one process share, because loading a model is slow.
///
/// The last test that uses the server drops it. It must not live until the process exits: a device that computes
/// during the exit would crash the process.
pub struct SharedServer(Option<(Runtime, TestServer)>);

impl SharedServer {
    /// Returns the server in `kept`, or starts a new one.
    pub fn get(kept: &Mutex<Weak<Self>>, setup: impl FnOnce() -> Setup + Send) -> Arc<Self> {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = kept.upgrade() {
            return shared;
        }
        let started = on_another_thread(|| {
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
        &self.0.as_ref().expect("the server is set until drop").1
    }
}

impl Drop for SharedServer {
    fn drop(&mut self) {
        let Some((runtime, server)) = self.0.take() else {
            return;
        };
        on_another_thread(move || {
            drop(server);
            drop(runtime);
        });
    }
}

/// Runs `function` on another thread. Inside the test's async runtime, another runtime can be neither entered nor
/// dropped.
fn on_another_thread<T: Send>(function: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let joined = scope.spawn(function).join();
        joined.expect("the function does not panic")
    })
}

/// A server that runs until it is dropped.
pub struct TestServer {
    server: Server,
}

/// Builder of a `TestServer`.
#[derive(Clone)]
pub struct Setup {
    pub parts: ServerParts,
}

/// Returns a route of the model `m` that uses engine `0`, and the further engines as its fallbacks.
pub fn route_with_fallbacks(fallbacks: usize, policy: RoutePolicy) -> RouteSpec {
    let target = |number: usize| TargetSpec {
        engine: number.to_string().into(),
        model: None,
        weight: 1,
    };
    RouteSpec {
        model: "m".to_owned(),
        targets: vec![target(0)],
        fallback: (1..=fallbacks).map(target).collect(),
        policy,
    }
}

/// Returns options of the test runner without any delay between tokens.
pub fn full_speed() -> TestRunnerOptions {
    with_interval(Duration::ZERO)
}

/// Returns options of the test runner with this time between tokens.
pub fn with_interval(interval: Duration) -> TestRunnerOptions {
    TestRunnerOptions {
        interval,
        ..TestRunnerOptions::default()
    }
}

/// Returns options of the test runner that stops emitting before the token with this index, without ending the
/// sequence.
pub fn silent_at(index: u32) -> TestRunnerOptions {
    TestRunnerOptions {
        silent_at: Some(index),
        ..full_speed()
    }
}

impl Setup {
    /// Serves the test runner over HTTP and gRPC.
    pub fn test_runner(options: TestRunnerOptions) -> Self {
        Self::runner("llm_test", Arc::new(TestRunnerLoader::new(options)), 1024)
    }

    /// Serves a model that cannot be loaded.
    pub fn unloadable() -> Self {
        Self::runner("llm_test", Arc::new(Unloadable), 1)
    }

    /// Serves one model on any runner over HTTP and gRPC.
    pub fn runner(name: &str, loader: Arc<dyn Loader>, slots: usize) -> Self {
        let loopback = || Address::Tcp("127.0.0.1:0".to_owned());
        let engine = EngineParts {
            models: vec![model(name, loader, slots)],
            unknown_model: UnknownModelPolicy::Refuse,
            workers: WorkerParts::default(),
        };
        Self {
            parts: ServerParts {
                http: Some(HttpFrontend::listening_on(loopback())),
                grpc: Some(loopback()),
                request_timeout: Duration::from_secs(60),
                drain: DrainDurations {
                    grace: Duration::ZERO,
                    timeout: Duration::from_secs(10),
                },
                ..ServerParts::new(Source::Engine(engine))
            },
        }
    }

    /// Serves a gateway in front of other servers.
    pub fn gateway(engines: &[&TestServer]) -> Self {
        let addresses: Vec<_> = engines.iter().map(|engine| engine.grpc_url()).collect();
        Self::gateway_at(&addresses)
    }

    /// Serves a gateway in front of the engines at these addresses.
    pub fn gateway_at(engines: &[impl AsRef<str>]) -> Self {
        let address = |engine: &str| engine.parse().expect("an engine's address");
        let engines = engines.iter().map(|engine| address(engine.as_ref()));
        let mut setup = Self::test_runner(full_speed());
        setup.parts.source = Source::Remote(engines.collect());
        setup
    }

    /// Serves a gateway with this route to the engines at these addresses, which are named `0`, `1` and so on.
    pub fn route(engines: &[String], route: RouteSpec) -> Self {
        let mut setup = Self::gateway_at(engines);
        let Source::Remote(cluster) = &mut setup.parts.source else {
            panic!("it is a gateway")
        };
        for (number, engine) in cluster.engines.iter_mut().enumerate() {
            engine.name = number.to_string().into();
        }
        cluster.routes = vec![route];
        setup
    }

    pub fn engine(&mut self) -> &mut EngineParts {
        match &mut self.parts.source {
            Source::Engine(engine) => engine,
            Source::Remote(_) => panic!("a gateway has no engine"),
        }
    }

    /// Adds another model on the test runner.
    pub fn with_model(mut self, name: &str, options: TestRunnerOptions) -> Self {
        let loader = Arc::new(TestRunnerLoader::new(options));
        self.engine().models.push(model(name, loader, 1024));
        self
    }

    /// Makes requests for an unknown model use the first model.
    pub fn unknown_model_uses_first(mut self) -> Self {
        self.engine().unknown_model = UnknownModelPolicy::First;
        self
    }

    /// Makes the server ignore unknown request fields instead of rejecting them.
    pub fn ignoring_unknown_fields(mut self) -> Self {
        self.http().unknown_fields = UnknownFieldPolicy::Ignore;
        self
    }

    /// Makes the server send the headers of a streamed response after this time in the queue.
    pub fn headers_after(mut self, after: Duration) -> Self {
        self.http().headers_after = Some(after);
        self
    }

    fn http(&mut self) -> &mut HttpFrontend {
        self.parts.http.as_mut().expect("the HTTP API is enabled")
    }

    /// Makes a choice end when its worker is lost, instead of being resumed.
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
        self.parts.drain = DrainDurations { grace, timeout };
        self
    }

    /// Starts the server and waits until its models are loaded. A gateway loads no model, so nothing is waited for.
    pub async fn start(self) -> TestServer {
        let has_engine = matches!(self.parts.source, Source::Engine(_));
        let server = self.start_loading().await;
        if has_engine {
            server.ready().await.expect("the model is loaded");
        }
        server
    }

    /// Starts the server without waiting for its models.
    pub async fn start_loading(self) -> TestServer {
        TestServer {
            server: Server::start(self.parts).await.expect("the server starts"),
        }
    }
}

impl TestServer {
    /// Waits until all models are loaded. Returns the error if a model cannot be loaded.
    pub async fn ready(&self) -> Result<(), StartError> {
        self.server.ready(|_| ()).await
    }

    pub fn http_address(&self) -> String {
        self.server
            .http_address()
            .expect("the HTTP API is enabled")
            .to_string()
    }

    pub fn http_url(&self) -> String {
        format!("http://{}", self.http_address())
    }

    pub fn grpc_address(&self) -> String {
        self.server
            .grpc_address()
            .expect("the gRPC API is enabled")
            .to_string()
    }

    pub fn grpc_url(&self) -> String {
        format!("http://{}", self.grpc_address())
    }

    pub async fn grpc(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(self.grpc_url())
            .await
            .expect("the gRPC API accepts connections")
    }

    /// Starts a completion over gRPC. Returns once the request is admitted.
    pub async fn stream(
        &self,
        request: impl IntoRequest<v1::CompletionRequest>,
    ) -> Streaming<v1::CompletionEvent> {
        let response = self.grpc().await.complete(request).await;
        response.expect("the request is admitted").into_inner()
    }

    pub fn telemetry(&self) -> &Telemetry {
        self.server.telemetry()
    }

    /// Waits until all models are loaded.
    pub async fn wait_until_loaded(&self) {
        self.server
            .ready(|_| ())
            .await
            .expect("the model is loaded");
    }

    /// Waits until the server's readiness is exactly `Loading(fraction)`.
    pub async fn wait_until_loaded_fraction(&self, fraction: f32) {
        let mut readiness = self.server.readiness().expect("the server has an engine");
        let is_loaded = |readiness: &Readiness| *readiness == Readiness::Loading(fraction);
        readiness
            .wait_for(is_loaded)
            .await
            .expect("the engine is running");
    }

    /// Waits until loading a model has failed.
    pub async fn wait_until_load_failed(&self) {
        let mut readiness = self.server.readiness().expect("the server has an engine");
        let failed = |readiness: &Readiness| matches!(readiness, Readiness::Failed { .. });
        readiness
            .wait_for(failed)
            .await
            .expect("the engine is running");
    }

    /// Waits until at least one model has no ready worker.
    pub async fn wait_until_not_ready(&self) {
        let mut readiness = self.server.readiness().expect("the server has an engine");
        let lost = |readiness: &Readiness| *readiness != Readiness::Ready;
        readiness
            .wait_for(lost)
            .await
            .expect("the engine is running");
    }

    /// Waits until a worker was lost and is ready again.
    pub async fn wait_until_restarted(&self) {
        self.wait_until_not_ready().await;
        let mut readiness = self.server.readiness().expect("the server has an engine");
        let ready = |readiness: &Readiness| *readiness == Readiness::Ready;
        readiness
            .wait_for(ready)
            .await
            .expect("the engine is running");
    }

    /// Drains the server and returns its final metrics.
    pub async fn drain(self) -> MetricsSnapshot {
        let telemetry = self.server.telemetry().clone();
        self.server.drain().await;
        MetricsSnapshot(telemetry.render())
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
        Err(LoadError("the model file is missing".to_owned()))
    }

    fn name(&self) -> &'static str {
        "unloadable"
    }
}
