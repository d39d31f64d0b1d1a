//! Standard output and standard error that nobody reads. The server keeps serving, drains cleanly and loses no token.

mod support;

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write, pipe};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use support::http::{BodyEnd, Response, completion, get};
use support::program::{Program, start_server, tokenway};
use support::running_program::{RunningProgram, wait_until_gone};
use support::{Setup, TestServer, full_speed, grpc};
use tempfile::TempDir;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::server::Source;

const TOKENS: usize = 100;

/// Number of tokens in a stream that makes the server write megabytes of trace log.
const MANY_TOKENS: u32 = 20_000;

/// The capacity of a pipe on Linux, in bytes.
const PIPE_BYTES: usize = 64 * 1024;

/// An engine process with a Unix socket, and a gateway inside the test. The engine's output cannot be read, so the
/// gateway's health shows when the engine is ready.
struct EngineAndGateway {
    engine: RunningProgram,
    gateway: TestServer,
    _folder: TempDir,
}

async fn start_engine_and_gateway(
    start: impl FnOnce(Program) -> RunningProgram,
) -> EngineAndGateway {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("engine.sock").display());
    let program = tokenway().args(["engine", "--grpc-listen", &socket, "--drain-grace", "0"]);
    let program = program.env("TOKENWAY_LOG", "trace");
    let engine = start(program.env("TEST_RUNNER_FREQUENCY_MS", "5"));
    let mut setup = Setup::test_runner(full_speed());
    setup.parts.source = Source::Remote(
        [socket.parse().expect("an engine's address")]
            .into_iter()
            .collect(),
    );
    setup.parts.grpc = None;
    let gateway = setup.start_loading().await;
    gateway.ready().await.expect("the engine is up");
    EngineAndGateway {
        engine,
        gateway,
        _folder: folder,
    }
}

impl EngineAndGateway {
    /// Asserts that a running stream is completed while the engine drains, and that the engine exits with code 0.
    async fn assert_drains_cleanly(self) {
        let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
        let mut stream = completion(&body).send(&self.gateway).await;
        assert!(stream.read_line().await.is_some());
        self.engine.signal(Signal::TERM);
        assert_rest_is_complete(stream, TOKENS - 1).await;
        assert_eq!(self.engine.wait_for_exit_code().await, Some(0));
    }
}

async fn assert_rest_is_complete(mut stream: Response, left: usize) {
    let rest = stream.read_rest().await;
    assert_eq!((rest.end, rest.lines().len()), (BodyEnd::Clean, left));
}

fn full_disk() -> File {
    let full = File::options().write(true).open("/dev/full");
    full.expect("Linux has /dev/full")
}

#[tokio::test]
async fn a_full_disk_loses_output_and_nothing_else() {
    let with_full_disk = |program: Program| {
        program
            .log_to_file(full_disk())
            .start_with_output(full_disk())
    };
    start_engine_and_gateway(with_full_disk)
        .await
        .assert_drains_cleanly()
        .await;
}

#[tokio::test]
async fn closed_pipes_lose_output_and_nothing_else() {
    let with_closed_pipes = |program: Program| {
        let (reader, writer) = pipe().expect("a pipe can be created");
        let (program, log) = program.log_to_pipe();
        drop((reader, log));
        program.start_with_output(writer)
    };
    start_engine_and_gateway(with_closed_pipes)
        .await
        .assert_drains_cleanly()
        .await;
}

#[tokio::test]
async fn full_pipes_lose_output_and_nothing_else() {
    let ((output, writer), (log, log_writer)) = (full_pipe(), full_pipe());
    let with_full_pipes = |program: Program| {
        let program = program.log_to_file(log_writer);
        program.start_with_output(writer)
    };
    start_engine_and_gateway(with_full_pipes)
        .await
        .assert_drains_cleanly()
        .await;
    drop((output, log));
}

/// Creates a full pipe. It stays open and full for as long as the reading end is held.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().expect("a pipe can be created");
    writer
        .write_all(&[b'\n'; PIPE_BYTES])
        .expect("the pipe has room");
    (reader, writer)
}

#[tokio::test]
async fn dropped_log_lines_are_counted() {
    let free = "127.0.0.1:0";
    let listen = ["serve", "--http-listen", free, "--grpc-listen", free];
    let program = tokenway().args(listen).args(["--drain-grace", "0"]);
    let program = program.env("TOKENWAY_LOG", "trace");
    let (log, writer) = full_pipe();
    let program = program.env("TEST_RUNNER_FREQUENCY_MS", "0");
    let mut running = program.log_to_file(writer).start();
    let mut url = async || {
        let line = running.read_line().await;
        line.split_whitespace().nth(1).expect("a URL").to_owned()
    };
    let (http, grpc_url) = (url().await, url().await);
    assert!(running.read_line().await.starts_with("ready "));
    let client = InferenceClient::connect(grpc_url).await;
    let client = client.expect("the server accepts connections");
    // These streams make the server write several megabytes of trace log.
    let streams = (0..8).map(|_| async {
        let stream = client
            .clone()
            .complete(grpc::request("a", MANY_TOKENS))
            .await;
        grpc::collect(stream.expect("the request is admitted").into_inner()).await
    });
    for completion in join_all(streams).await {
        assert_eq!(completion.usage().completion_tokens, MANY_TOKENS);
    }
    let mut metrics = get("/metrics").send_to(&http.replace("http://", "")).await;
    let metrics = metrics.read_rest().await.text;
    let dropped = metrics
        .lines()
        .find_map(|line| line.strip_prefix("tokenway_log_lines_dropped_total "));
    let dropped: f64 = dropped
        .expect("the metric exists")
        .parse()
        .expect("a number");
    assert!(dropped > 0.0, "{metrics}");
    assert_eq!(running.interrupt().await, Some(0));
    drop(log);
}

#[tokio::test]
async fn a_worker_with_an_unread_log_keeps_serving() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("workers.sock").display());
    let (log, writer) = full_pipe();
    let worker = tokenway().args(["worker", "--engine", &socket, "--runner", "llm_test"]);
    let worker = worker.env("TOKENWAY_LOG", "trace").log_to_file(writer);
    let worker = worker.start();
    let arguments = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--drain-grace",
        "0",
    ];
    let arguments = [&arguments[..], &["--worker-listen", &socket]].concat();
    let (engine, [http, _]) = start_server(&arguments).await;
    let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
    let stream = completion(&body)
        .send_to(&http.replace("http://", ""))
        .await;
    assert_rest_is_complete(stream, TOKENS).await;
    worker.signal(Signal::TERM);
    assert_eq!(worker.wait_for_exit_code().await, Some(0));
    assert_eq!(engine.interrupt().await, Some(0));
    drop(log);
}

#[tokio::test]
async fn a_lost_worker_process_is_replaced_with_unread_output() {
    let isolated = ["--isolation", "process", "--drain-grace", "0"];
    let slow = ["--test-runner-frequency-ms", "5", "--slots", "4"];
    let (mut server, [http, _]) = start_server(&[isolated, slow].concat()).await;
    server.close_log();
    server.close_output();
    let address = http.replace("http://", "");
    let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
    let mut stream = completion(&body).send_to(&address).await;
    assert!(stream.read_line().await.is_some());
    let [child] = server.children()[..] else {
        panic!("expected one worker process")
    };
    server.signal_child(child, Signal::KILL);
    wait_until_gone(child).await;
    assert_rest_is_complete(stream, TOKENS - 1).await;
    assert_eq!(server.interrupt().await, Some(0));
}

#[tokio::test]
async fn help_into_a_closed_pipe_exits_with_0() {
    let (reader, writer) = pipe().expect("a pipe can be created");
    drop(reader);
    let (program, log) = tokenway().arg("--help").log_to_pipe();
    let running = program.start_with_output(writer);
    assert_eq!(running.wait_for_exit_code().await, Some(0));
    let log = std::io::read_to_string(log).expect("the log is UTF-8");
    assert_eq!(log, "");
}
