//! The logs of `tokenway` processes: every line about a request carries its id, and no line contains what a client sent
//! or received.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::grpc;
use support::http::{completion, post};
use support::log::parse;
use support::program::{Running, tokenway};
use tempfile::TempDir;
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::Request;

const FREE: &str = "127.0.0.1:0";

/// Messages about a process, a worker or a connection as a whole.
const NOT_ABOUT_A_REQUEST: [&str; 10] = [
    "the engine has accepted this worker",
    "an engine is up",
    "an engine joins the cluster",
    "an engine leaves the cluster",
    "an engine is down",
    "a worker was lost and will be restarted",
    "a worker has connected",
    "a worker took no more work",
    "no connection to the engine; reconnecting",
    "a connection failed",
];

/// Processes that log to files in one folder.
struct Fleet {
    folder: TempDir,
    running: Vec<Running>,
    log_filter: &'static str,
    http: String,
    grpc: String,
}

impl Fleet {
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

    /// Starts a process. Returns the addresses of its `apis` APIs.
    async fn start(&mut self, arguments: &[&str], apis: usize) -> Vec<String> {
        let log = self.log(self.running.len());
        let program = tokenway()
            .args(arguments)
            .args(["--log-format", "json", "--drain-grace", "0"])
            .env("TOKENWAY_LOG", self.log_filter);
        let mut running = program.log_to(&log).start();
        let mut addresses = Vec::new();
        for _ in 0..apis {
            let line = running.line().await;
            let url = line.split_whitespace().nth(1).expect("an address");
            addresses.push(url.trim_start_matches("http://").to_owned());
        }
        while !running.line().await.starts_with("ready ") {}
        self.running.push(running);
        addresses
    }

    /// One process with both APIs.
    async fn serve(&mut self, arguments: &[&str]) {
        let serve = ["serve", "--http-listen", FREE, "--grpc-listen", FREE];
        let addresses = self.start(&[&serve, arguments].concat(), 2).await;
        [self.http, self.grpc] = addresses.try_into().expect("two addresses");
    }

    /// An engine, and a gateway in front of it with both APIs.
    async fn gateway(&mut self, arguments: &[&str]) {
        let engine = ["engine", "--grpc-listen", FREE];
        let engine = self.start(&[&engine, arguments].concat(), 1).await;
        let url = format!("http://{}", engine[0]);
        let listen = ["gateway", "--http-listen", FREE, "--grpc-listen", FREE];
        let gateway = [&listen[..], &["--engine", &url]].concat();
        let addresses = self.start(&gateway, 2).await;
        [self.http, self.grpc] = addresses.try_into().expect("two addresses");
    }

    /// Completes over both APIs. The ids are `http` and `grpc`.
    async fn complete(&self) {
        self.complete_over_http().await;
        self.complete_over_grpc().await;
    }

    async fn complete_over_http(&self) {
        let body = json!({"prompt": "a", "max_tokens": 4, "stream": true});
        let http = completion(&body).header("x-request-id", "http");
        http.send_to(&self.http).await.rest().await;
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

    /// Stops the processes, the last first, and returns their logs.
    async fn stop(mut self) -> Vec<String> {
        let count = self.running.len();
        while let Some(running) = self.running.pop() {
            running.signal(Signal::TERM);
            assert_eq!(running.end().await, Some(0));
        }
        let read = |process| read(&self.log(process));
        (0..count).map(read).collect()
    }
}

fn read(log: &Path) -> String {
    std::fs::read_to_string(log).expect("the log is UTF-8")
}

/// Asserts that every line about a request has its id. Returns the messages of each request's lines.
fn assert_ids(log: &str) -> [BTreeSet<String>; 2] {
    let mut messages = [BTreeSet::new(), BTreeSet::new()];
    for line in parse(log) {
        let message = line["message"].as_str().expect("a message").to_owned();
        match line["id"].as_str() {
            Some("http") => _ = messages[0].insert(message),
            Some("grpc") => _ = messages[1].insert(message),
            // The requests of a gateway that watches its engine.
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

const FAILING: [&str; 2] = ["--test-runner-fail-at", "2"];

/// Lines of the step loop and of the stream of a sequence that fails.
const FAILURE: [&str; 4] = [
    "a sequence starts",
    "a sequence fails",
    "the model failed on a sequence",
    "request",
];

#[tokio::test]
async fn a_failure_on_a_worker_thread_is_logged_with_the_requests_id() {
    let mut fleet = Fleet::new("tokenway=debug");
    fleet.serve(&FAILING).await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    assert_contains(&assert_ids(&logs[0]), &FAILURE);
}

#[tokio::test]
async fn a_failure_in_a_worker_process_is_logged_with_the_requests_id_by_both_processes() {
    let mut fleet = Fleet::new("tokenway=debug");
    fleet
        .serve(&[&FAILING[..], &["--isolation", "process"]].concat())
        .await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    let messages = assert_ids(&logs[0]);
    assert_contains(&messages, &FAILURE);
    assert_contains(&messages, &["a sequence is submitted to a remote worker"]);
    let of_child = |line: &Value| {
        line["worker"] == "worker-0" && line["message"] == "a sequence starts" && line["slot"] == 0
    };
    let lines = parse(&logs[0]);
    assert!(
        lines.iter().any(of_child),
        "the child's fields are kept: {}",
        logs[0]
    );
}

#[tokio::test]
async fn a_gateway_and_its_engine_log_the_same_id() {
    let mut fleet = Fleet::new("tokenway=debug");
    fleet.gateway(&FAILING).await;
    fleet.complete().await;
    let logs = fleet.stop().await;
    assert_contains(&assert_ids(&logs[0]), &FAILURE);
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
    // Each API has a server of its own: a second request would find no worker while the first one's restarts.
    let mut fleet = Fleet::new("tokenway=debug");
    fleet.serve(&panicking).await;
    fleet.complete_over_http().await;
    let [http, _] = assert_ids(&fleet.stop().await[0]);
    let mut fleet = Fleet::new("tokenway=debug");
    fleet.serve(&panicking).await;
    fleet.complete_over_grpc().await;
    let [_, grpc] = assert_ids(&fleet.stop().await[0]);
    assert_contains(&[http, grpc], &expected);
}

/// Texts that clients send and receive in the canary test. The test runner's tokens are `token_0`, `token_1`, …
const CANARIES: [&str; 5] = [
    "CanaryPrompt",
    "CanaryKey",
    "CanaryUser",
    "CanaryStop",
    "token_1",
];

#[tokio::test]
async fn no_output_contains_a_prompt_a_completion_or_a_key() {
    let mut fleet = Fleet::new("tokenway=trace");
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
        request.send_to(&fleet.http).await.rest().await;
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
    let program = tokenway().args(["serve", "--http-listen", FREE, "--grpc-listen", FREE]);
    let mut running = program.args(FAILING).log_to(&log).start();
    let line = running.line().await;
    let address = line.split_whitespace().nth(1).expect("an address");
    while !running.line().await.starts_with("ready ") {}
    let body = json!({"prompt": "a", "max_tokens": 4});
    let request = completion(&body).header("x-request-id", "my-id");
    let response = request.send_to(address.trim_start_matches("http://")).await;
    assert_eq!(response.status, 500);
    running.signal(Signal::TERM);
    assert_eq!(running.end().await, Some(0));
    let log = read(&log);
    for part in [
        "request{id=my-id",
        "the model failed on a sequence",
        "outcome=\"internal_error\"",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
}
