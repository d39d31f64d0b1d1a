//! The logs of `tokenway` processes: every line about a request has the request's id, and no line contains what a
//! client sent or received.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::grpc;
use support::http::{completion, post};
use support::log::parse_log;
use support::program::tokenway;
use support::running_program::RunningProgram;
use tempfile::TempDir;
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::Request;

const FREE_PORT: &str = "127.0.0.1:0";

/// Messages that concern a process, a worker or a connection, and therefore no single request.
const NOT_ABOUT_A_REQUEST: [&str; 11] = [
    "a worker is ready",
    "the engine has accepted this worker",
    "an engine is up",
    "an engine joins the cluster",
    "an engine leaves the cluster",
    "an engine is down",
    "a worker was lost and will be restarted",
    "a worker has connected",
    "a worker's queue did not accept a sequence",
    "no connection to the engine; reconnecting",
    "a connection failed",
];

/// Several `tokenway` processes, whose logs are files in one folder.
struct LoggedProcesses {
    folder: TempDir,
    running: Vec<RunningProgram>,
    log_filter: &'static str,
    http: String,
    grpc: String,
}

impl LoggedProcesses {
    fn new(log_filter: &'static str) -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            running: Vec::new(),
            log_filter,
            http: String::new(),
            grpc: String::new(),
        }
    }

    fn log(&self, process: usize) -> PathBuf {
        self.folder.path().join(format!("{process}.log"))
    }

    /// Starts a process with `apis` APIs. Returns the addresses of the APIs.
    async fn start(&mut self, arguments: &[&str], apis: usize) -> Vec<String> {
        let log = self.log(self.running.len());
        let program = tokenway()
            .args(arguments)
            .args(["--log-format", "json", "--drain-grace", "0"])
            .env("TOKENWAY_LOG", self.log_filter);
        let mut running = program.log_to(&log).start();
        let mut addresses = Vec::new();
        for _ in 0..apis {
            let line = running.read_line().await;
            let url = line.split_whitespace().nth(1).expect("an address");
            addresses.push(url.trim_start_matches("http://").to_owned());
        }
        while !running.read_line().await.starts_with("ready ") {}
        self.running.push(running);
        addresses
    }

    /// Starts one process with both APIs.
    async fn serve(&mut self, arguments: &[&str]) {
        let serve = [
            "serve",
            "--http-listen",
            FREE_PORT,
            "--grpc-listen",
            FREE_PORT,
        ];
        let addresses = self.start(&[&serve, arguments].concat(), 2).await;
        [self.http, self.grpc] = addresses.try_into().expect("two addresses");
    }

    /// Starts an engine, and a gateway with both APIs in front of it.
    async fn gateway(&mut self, arguments: &[&str]) {
        let engine = ["engine", "--grpc-listen", FREE_PORT];
        let engine = self.start(&[&engine, arguments].concat(), 1).await;
        let url = format!("http://{}", engine[0]);
        let listen = [
            "gateway",
            "--http-listen",
            FREE_PORT,
            "--grpc-listen",
            FREE_PORT,
        ];
        let gateway = [&listen[..], &["--engine", &url]].concat();
        let addresses = self.start(&gateway, 2).await;
        [self.http, self.grpc] = addresses.try_into().expect("two addresses");
    }

    /// Completes a prompt over each API. The request ids are `http` and `grpc`.
    async fn complete(&self) {
        self.complete_over_http().await;
        self.complete_over_grpc().await;
    }

    async fn complete_over_http(&self) {
        let body = json!({"prompt": "a", "max_tokens": 4, "stream": true});
        let http = completion(&body).header("x-request-id", "http");
        http.send_to(&self.http).await.read_rest().await;
    }

    async fn complete_over_grpc(&self) {
        let mut request = Request::new(grpc::request("a", 4));
        let id = "grpc".parse().expect("a metadata value");
        request.metadata_mut().insert("x-request-id", id);
        let mut client = self.client().await;
        if let Ok(response) = client.complete(request).await {
            grpc::collect(response.into_inner()).await;
        }
    }

    async fn client(&self) -> InferenceClient<tonic::transport::Channel> {
        let client = InferenceClient::connect(format!("http://{}", self.grpc)).await;
        client.expect("the gRPC API accepts connections")
    }

    /// Stops all processes, the last one first. Returns their logs.
    async fn stop(mut self) -> Vec<String> {
        let count = self.running.len();
        while let Some(running) = self.running.pop() {
            running.signal(Signal::TERM);
            assert_eq!(running.wait_for_exit_code().await, Some(0));
        }
        let read = |process| read_log(&self.log(process));
        (0..count).map(read).collect()
    }
}

fn read_log(log: &Path) -> String {
    std::fs::read_to_string(log).expect("the log is UTF-8")
}

/// Asserts that every line about a request has the request's id. Returns the messages of the lines about each
/// request.
fn assert_ids(log: &str) -> [BTreeSet<String>; 2] {
    let mut messages = [BTreeSet::new(), BTreeSet::new()];
    for line in parse_log(log) {
        let message = line["message"].as_str().expect("a message").to_owned();
        match line["id"].as_str() {
            Some("http") => _ = messages[0].insert(message),
            Some("grpc") => _ = messages[1].insert(message),
            // A gateway's own health-check requests to its engine have random ids.
            Some(_) => assert_eq!(message, "request", "{line}"),
            None => assert!(is_about_a_process(&line), "a line without an id: {line}"),
        }
    }
    messages
}

fn is_about_a_process(line: &Value) -> bool {
    let message = line["message"].as_str().unwrap_or_default();
    NOT_ABOUT_A_REQUEST.contains(&message) || message.contains("the test runner panics")
}

fn assert_contains(messages: &[BTreeSet<String>; 2], expected: &[&str]) {
    for messages in messages {
        for message in expected {
            assert!(messages.contains(*message), "{message}: {messages:?}");
        }
    }
}

const FAILING_RUNNER_FLAGS: [&str; 2] = ["--test-runner-fail-at", "2"];

/// Messages that the step loop and the stream log for a sequence that fails.
const FAILURE_MESSAGES: [&str; 4] = [
    "a sequence starts",
    "a sequence fails",
    "the model failed on a sequence",
    "request",
];

#[tokio::test]
async fn a_failure_on_a_worker_thread_is_logged_with_the_requests_id() {
    let mut fleet = LoggedProcesses::new("tokenway=debug");
    fleet.serve(&FAILING_RUNNER_FLAGS).await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    assert_contains(&assert_ids(&logs[0]), &FAILURE_MESSAGES);
}

#[tokio::test]
async fn a_filter_for_one_module_does_not_remove_the_requests_id() {
    let mut fleet = LoggedProcesses::new("tokenway::text=info");
    fleet.serve(&FAILING_RUNNER_FLAGS).await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    assert_contains(&assert_ids(&logs[0]), &["the model failed on a sequence"]);
}

#[tokio::test]
async fn a_failure_in_a_worker_process_is_logged_with_the_requests_id_by_both_processes() {
    let mut fleet = LoggedProcesses::new("tokenway=debug");
    fleet
        .serve(&[&FAILING_RUNNER_FLAGS[..], &["--isolation", "process"]].concat())
        .await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    let messages = assert_ids(&logs[0]);
    assert_contains(&messages, &FAILURE_MESSAGES);
    assert_contains(&messages, &["a sequence is submitted to a remote worker"]);
    let of_child = |line: &Value| {
        line["worker"] == "worker-0" && line["message"] == "a sequence starts" && line["slot"] == 0
    };
    let lines = parse_log(&logs[0]);
    assert!(
        lines.iter().any(of_child),
        "the child's fields are kept: {}",
        logs[0]
    );
}

#[tokio::test]
async fn a_gateway_and_its_engine_log_the_same_id() {
    let mut fleet = LoggedProcesses::new("tokenway=debug");
    fleet.gateway(&FAILING_RUNNER_FLAGS).await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    assert_contains(&assert_ids(&logs[0]), &FAILURE_MESSAGES);
    assert_contains(&assert_ids(&logs[1]), &["request"]);
}

#[tokio::test]
async fn a_lost_worker_process_is_logged_with_the_ids_of_the_requests_it_ran() {
    let panicking = ["--test-runner-panic-at", "2", "--isolation", "process"];
    let expected = [
        "a sequence starts",
        "resuming a choice on another worker: its worker was lost",
        "request",
    ];
    // Each API has its own server. On a shared server, the second request would find no worker while the worker
    // restarts.
    let mut fleet = LoggedProcesses::new("tokenway=debug");
    fleet.serve(&panicking).await;
    fleet.complete_over_http().await;
    let [http, _] = assert_ids(&fleet.stop().await[0]);
    let mut fleet = LoggedProcesses::new("tokenway=debug");
    fleet.serve(&panicking).await;
    fleet.complete_over_grpc().await;
    let [_, grpc] = assert_ids(&fleet.stop().await[0]);
    assert_contains(&[http, grpc], &expected);
}

/// Texts that clients send and receive in the canary test. No log may contain them. The test runner's tokens are
/// `token_0`, `token_1`, …
const CANARIES: [&str; 5] = [
    "CanaryPrompt",
    "CanaryKey",
    "CanaryUser",
    "CanaryStop",
    "token_1",
];

#[tokio::test]
async fn no_output_contains_a_prompt_a_completion_or_a_key() {
    let mut fleet = LoggedProcesses::new("tokenway=trace");
    fleet.gateway(&["--isolation", "process"]).await;
    let body = |stream: bool| {
        json!({
            "prompt": "CanaryPrompt", "max_tokens": 4, "stream": stream, "user": "CanaryUser",
            "stop": ["CanaryStop"],
        })
    };
    let chat = json!({"messages": [{"role": "user", "content": "CanaryPrompt"}], "max_tokens": 4});
    let tokenize = json!({"prompt": "CanaryPrompt"});
    let invalid = json!({"prompt": "CanaryPrompt", "temperature": "CanaryPrompt"});
    for request in [
        completion(&body(true)),
        completion(&body(false)),
        post("/v1/chat/completions", chat.to_string()),
        post("/tokenize", tokenize.to_string()),
        completion(&invalid),
    ] {
        let request = request.header("authorization", "Bearer CanaryKey");
        request.send_to(&fleet.http).await.read_rest().await;
    }
    let mut request = Request::new(v1::CompletionRequest {
        user: "CanaryUser".to_owned(),
        stop: vec!["CanaryStop".to_owned()],
        ..grpc::request("CanaryPrompt", 4)
    });
    let key = "Bearer CanaryKey".parse().expect("a metadata value");
    request.metadata_mut().insert("authorization", key);
    let response = fleet.client().await.complete(request).await;
    grpc::collect(response.expect("the request is admitted").into_inner()).await;
    for log in fleet.stop().await {
        assert!(log.contains("tokenway::access"), "{log}");
        for canary in CANARIES {
            assert!(!log.contains(canary), "{canary} is in the log: {log}");
        }
    }
}

#[tokio::test]
async fn the_human_log_has_the_id_too() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("log");
    let program = tokenway().args([
        "serve",
        "--http-listen",
        FREE_PORT,
        "--grpc-listen",
        FREE_PORT,
    ]);
    let mut running = program.args(FAILING_RUNNER_FLAGS).log_to(&log).start();
    let line = running.read_line().await;
    let address = line.split_whitespace().nth(1).expect("an address");
    while !running.read_line().await.starts_with("ready ") {}
    let body = json!({"prompt": "a", "max_tokens": 4});
    let request = completion(&body).header("x-request-id", "my-id");
    let response = request.send_to(address.trim_start_matches("http://")).await;
    assert_eq!(response.status, 500);
    running.signal(Signal::TERM);
    assert_eq!(running.wait_for_exit_code().await, Some(0));
    let log = read_log(&log);
    for part in [
        "request{id=my-id",
        "the model failed on a sequence",
        "outcome=\"internal_error\"",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
}
