//! The Python worker in `examples/python_worker`: its own tests, and its two runners with a real engine.

mod support;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use support::grpc::{self, collect_from};
use support::http::{completion, get, texts};
use support::metrics::MetricsSnapshot;
use support::program::{
    Program, python_worker, python_worker_command, python_worker_tests, start_server,
};
use support::running_program::RunningProgram;
use support::{Setup, full_speed, model_path};
use tempfile::TempDir;
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::server::Isolation;
use tokenway::worker::child;
use tonic::transport::Channel;

/// An engine with remote workers, and the path of its worker socket.
struct Engine {
    _running: RunningProgram,
    http: String,
    grpc: InferenceClient<Channel>,
    socket: String,
    _folder: TempDir,
}

/// Starts an engine and one worker, and waits until the engine is ready. Adds the worker's process to `workers`.
async fn start_engine(
    workers: &mut Vec<RunningProgram>,
    worker: impl Fn(&str) -> Program,
) -> Engine {
    start_engine_with(&[], workers, worker).await
}

/// Starts an engine with additional flags, and one worker. Waits until the engine is ready.
async fn start_engine_with(
    settings: &[&str],
    workers: &mut Vec<RunningProgram>,
    worker: impl Fn(&str) -> Program,
) -> Engine {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("workers.sock").display());
    workers.push(worker(&socket).start());
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        &socket,
    ];
    let (running, [http, grpc_url]) = start_server(&[&attached[..], settings].concat()).await;
    Engine {
        _running: running,
        http: http.replace("http://", ""),
        grpc: InferenceClient::connect(grpc_url)
            .await
            .expect("the server accepts connections"),
        socket,
        _folder: folder,
    }
}

impl Engine {
    async fn stream(
        &self,
        request: v1::CompletionRequest,
        progress: impl FnMut(u32),
    ) -> grpc::Completion {
        let stream = self.grpc.clone().complete(request).await;
        collect_from(
            stream.expect("the request is admitted").into_inner(),
            progress,
        )
        .await
    }

    /// Returns the value of `tokenway_workers_lost_total`.
    async fn workers_lost(&self) -> String {
        let metrics = get("/metrics").send_to(&self.http).await.read_rest().await;
        let lost = metrics
            .text
            .lines()
            .find_map(|line| line.strip_prefix("tokenway_workers_lost_total "));
        lost.unwrap_or("0").to_owned()
    }
}

fn echo_worker(socket: &str) -> Program {
    python_worker().args([
        "--engine",
        socket,
        "--runner",
        "echo",
        "--interval-ms",
        "2",
        "--slots",
        "16",
    ])
}

fn real_model_worker(socket: &str) -> Program {
    let worker = python_worker().args(["--engine", socket, "--runner", "xllamacpp"]);
    let worker = worker.args(["--slots", "2", "--threads", "1", "--context-length", "1024"]);
    worker.arg("--model-path").arg(model_path())
}

fn greedy_request(prompt: &str, max_tokens: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        temperature: Some(0.0),
        ..grpc::request(prompt, max_tokens)
    }
}

#[tokio::test]
async fn the_packages_own_tests_pass() {
    let outcome = python_worker_tests()
        .env("TOKENWAY_TEST_MODEL", model_path())
        .run()
        .await;
    assert_eq!(
        outcome.code,
        Some(0),
        "{}\n{}",
        outcome.stdout,
        outcome.stderr
    );
}

#[tokio::test]
async fn streams_survive_a_killed_python_worker() {
    let mut workers = Vec::new();
    let engine = start_engine(&mut workers, echo_worker).await;
    // The echo runner repeats the prompt byte by byte.
    let prompt = &"one two three ".repeat(20);
    let undisturbed = engine.stream(grpc::request(prompt, 200), |_| ()).await;
    workers.push(echo_worker(&engine.socket).start());
    let others = (0..8).map(|_| engine.stream(grpc::request(prompt, 200), |_| ()));
    let mut first = Some(workers.swap_remove(0));
    let with_fault = engine.stream(grpc::request(prompt, 200), |count| {
        if count > 20
            && let Some(worker) = first.take()
        {
            worker.signal(Signal::KILL);
        }
    });
    let (mut all, with_fault) = tokio::join!(join_all(others), with_fault);
    all.push(with_fault);
    assert_eq!(undisturbed.token_count(0), 200);
    for completion in all {
        assert!(completion.error.is_none(), "{:?}", completion.error);
        assert_eq!(completion.texts(0), undisturbed.texts(0));
    }
}

/// Returns an echo worker whose device holds Python's GIL for this long after each token.
fn lock_holding_worker(socket: &str, holds: Duration) -> Program {
    let folder = env!("CARGO_MANIFEST_DIR");
    echo_worker(socket)
        .args(["--runner", "holding_runner:HoldingRunner"])
        .env("HOLDS_MS", holds.as_millis().to_string())
        .env(
            "PYTHONPATH",
            format!("{folder}/examples/python_worker:{folder}/tests/clients"),
        )
}

#[tokio::test]
async fn a_device_call_that_holds_the_gil_does_not_lose_the_worker() {
    let mut workers = Vec::new();
    let gil_held = Duration::from_secs(1);
    let engine = start_engine_with(&["--heartbeat-timeout", "0.2"], &mut workers, |socket| {
        lock_holding_worker(socket, gil_held)
    })
    .await;
    let completion = engine.stream(grpc::request("abc", 3), |_| ()).await;
    assert!(completion.error.is_none(), "{:?}", completion.error);
    assert_eq!(completion.texts(0).concat(), "abc");
    assert_eq!(engine.workers_lost().await, "0");
}

#[tokio::test]
async fn killing_a_worker_that_holds_the_gil_is_detected_at_once() {
    let mut workers = Vec::new();
    let engine = start_engine_with(&[], &mut workers, |socket| {
        let hour = ["--heartbeat-timeout", "3600"];
        lock_holding_worker(socket, Duration::from_secs(1_800)).args(hour)
    })
    .await;
    let stream = engine.stream(grpc::request("abc", 3), |_| ());
    let killed = async {
        assert_eq!(workers[0].read_line().await, "holding");
        workers.push(echo_worker(&engine.socket).start());
        let killed_at = Instant::now();
        workers[0].signal(Signal::KILL);
        killed_at
    };
    let (completion, killed_at) = tokio::join!(stream, killed);
    let took = killed_at.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(completion.texts(0).concat(), "abc");
    assert_eq!(engine.workers_lost().await, "1");
}

#[tokio::test]
async fn a_real_model_on_a_python_worker_serves_both_apis() {
    let mut workers = Vec::new();
    let engine = start_engine(&mut workers, real_model_worker).await;
    let body = json!({"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "stream": true});
    let mut response = completion(&body).send_to(&engine.http).await;
    let http = texts(&response.read_rest().await.lines(), 0).concat();
    let grpc = engine
        .stream(greedy_request("The capital of France is", 4), |_| ())
        .await;
    assert_eq!(grpc.texts(0).concat(), http);
    assert!(http.starts_with(" Paris"), "{http}");
    assert_eq!(grpc.usage().prompt_tokens, 5);
}

#[tokio::test]
async fn a_disconnect_frees_the_slot_of_a_real_model_on_a_python_worker() {
    let mut workers = Vec::new();
    let engine = start_engine(&mut workers, |socket| {
        real_model_worker(socket).args(["--slots", "1"])
    })
    .await;
    let long = greedy_request("Once upon a time", 900);
    let stream = engine.grpc.clone().complete(long).await;
    let mut stream = stream.expect("the request is admitted").into_inner();
    for _ in 0..5 {
        stream
            .message()
            .await
            .expect("the stream continues")
            .expect("the stream continues");
    }
    drop(stream);
    // Generating all 900 tokens would take about 15 seconds.
    let next = engine
        .stream(greedy_request("The capital of France is", 1), |_| ())
        .await;
    assert_eq!(next.texts(0), [" Paris"]);
}

#[tokio::test]
async fn a_request_that_crashes_two_processes_is_not_retried_on_a_third() {
    let mut setup = Setup::test_runner(full_speed());
    let (path, arguments) = python_worker_command("tests/clients");
    let runner = ["--runner", "aborting_runner:AbortingRunner"].map(Into::into);
    setup.engine().models[0].isolation = Isolation::Process(child::Program {
        path,
        arguments: arguments.into_iter().chain(runner).collect(),
        settings: String::new(),
    });
    let server = setup.start().await;
    let body = json!({"prompt": "a", "max_tokens": 5});
    let (_, answer) = completion(&body).fetch(&server).await;
    assert_eq!(answer.error().0, "worker_lost");
    assert_eq!(
        MetricsSnapshot::take(&server).get("tokenway_workers_lost_total"),
        2.0
    );
}
