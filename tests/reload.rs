//! SIGHUP: a running gateway reads its settings file again, and applies its engines.

mod support;

use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::http::{BodyEnd, completion, get};
use support::openai_engine::{OpenAiEngine, whole};
use support::program::{Program, start_server, tokenway};
use support::running_program::RunningProgram;
use tempfile::TempDir;

const FREE_PORT: &str = "127.0.0.1:0";

/// A gateway with a settings file that the test changes.
struct Gateway {
    running: RunningProgram,
    /// Host and port of the HTTP API.
    http: String,
    file: PathBuf,
    _folder: TempDir,
}

fn gateway_program() -> Program {
    let listen = ["--http-listen", FREE_PORT, "--grpc-listen", FREE_PORT];
    let program = tokenway().arg("gateway").args(listen);
    program
        .args(["--drain-grace", "0"])
        .log_to_file(Stdio::piped())
}

/// Waits until a gateway is ready. Returns the host and the port of its HTTP API.
async fn wait_until_ready(gateway: &mut RunningProgram) -> String {
    let line = gateway.read_line().await;
    let url = line.split_whitespace().nth(1).expect("an address");
    let address = url.strip_prefix("http://").expect("a TCP address");
    for start in ["gRPC ", "waiting ", "ready "] {
        let line = gateway.read_line().await;
        assert!(line.starts_with(start), "{line}");
    }
    address.to_owned()
}

impl Gateway {
    /// Starts a gateway with these settings, in this environment.
    async fn start(settings: &str, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, settings).expect("a file");
        let mut program = gateway_program().arg("--config").arg(&file);
        for (name, value) in variables {
            program = program.env(name, value);
        }
        let mut running = program.start();
        let http = wait_until_ready(&mut running).await;
        Self {
            running,
            http,
            file,
            _folder: folder,
        }
    }

    /// Changes the settings file, sends SIGHUP, and waits for a log line that contains `expected`.
    async fn reload(&mut self, settings: &str, expected: &str) {
        std::fs::write(&self.file, settings).expect("a file");
        self.running.signal(Signal::HUP);
        self.running.wait_for_log(expected).await;
    }

    /// Returns the names of the models that the gateway lists.
    async fn models(&self) -> Vec<Value> {
        let body = get("/v1/models")
            .send_to(&self.http)
            .await
            .read_rest()
            .await;
        let body = body.json();
        let models = body["data"].as_array().expect("a list").iter();
        models.map(|model| model["id"].clone()).collect()
    }
}

/// Starts an engine with a model of this name. Returns the process and its `[[engine]]` table.
async fn engine(model: &str) -> (RunningProgram, String) {
    let frequency = ["--test-runner-frequency-ms", "5"];
    let name = ["--model-name", model];
    let (running, [_, grpc]) = start_server(&[frequency, name].concat()).await;
    (running, engine_table(model, &grpc, ""))
}

fn engine_table(name: &str, address: &str, more: &str) -> String {
    format!("[[engine]]\nname = \"{name}\"\naddress = \"{address}\"\n{more}\n")
}

#[tokio::test]
async fn a_reload_serves_the_new_engines_while_running_streams_go_on() {
    let (_first, first) = engine("first").await;
    let (_second, second) = engine("second").await;
    let mut gateway = Gateway::start(&first, &[]).await;
    assert_eq!(gateway.models().await, ["first"]);
    let body = json!({"prompt": "a", "max_tokens": 300, "stream": true});
    let mut stream = completion(&body).send_to(&gateway.http).await;
    assert!(stream.read_line().await.is_some());

    gateway
        .reload(&second, "the engines and routes were reloaded")
        .await;
    assert_eq!(gateway.models().await, ["second"]);
    let rest = stream.read_rest().await;
    assert_eq!((rest.lines().len(), rest.end), (299, BodyEnd::Clean));

    let both = [first, second].concat();
    gateway.reload(&both, "engines=2 routes=0").await;
    assert_eq!(gateway.models().await, ["first", "second"]);
    assert_eq!(gateway.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn a_mistake_in_the_file_is_logged_with_its_position_and_changes_nothing() {
    let (_engine, table) = engine("first").await;
    let mut gateway = Gateway::start(&table, &[]).await;
    let own_address = engine_table("itself", &format!("grpc://{}", gateway.http), "");
    let path = gateway.file.display().to_string();
    for (settings, expected) in [
        (
            engine_table("a", "nowhere", ""),
            format!("settings file {path}:3:1: engine[1].address: 'nowhere' is not a valid"),
        ),
        (
            engine_table("a", "openai+http://a:1", "api_key_env = \"UNSET\""),
            format!("settings file {path}:4:1: engine[1].api_key_env: this environment variable"),
        ),
        (
            [table.clone(), table.clone()].concat(),
            format!("settings file {path}:6:1: engine[1].name and engine[2].name are both"),
        ),
        (
            own_address,
            "is the address of this gateway itself".to_owned(),
        ),
        (String::new(), "is required for a gateway".to_owned()),
    ] {
        gateway.reload(&settings, &expected).await;
        assert_eq!(gateway.models().await, ["first"]);
    }
    gateway.reload(&table, "engines=1 routes=0").await;
    assert_eq!(gateway.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn settings_that_need_a_restart_are_named() {
    let (_engine, table) = engine("first").await;
    let mut gateway = Gateway::start(&table, &[]).await;
    let changed = "drain_timeout = 5\nrequest_timeout = 7\nslots = 3\nprefix_index_blocks = 0\n";
    let changed = format!("{changed}{table}");
    let expected = "restart the gateway to apply them settings=\"drain_timeout, request_timeout\"";
    gateway.reload(&changed, expected).await;
    assert_eq!(gateway.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn keys_are_read_from_the_environment_and_from_files_at_each_reload() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let table = |key: &str| engine_table("a", &engine.url(), key);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let key = folder.path().join("key");
    let from_file = table(&format!("api_key_file = \"{}\"", key.display()));
    let variables = [("A_KEY", "sk-0")];
    let mut gateway = Gateway::start(&table("api_key_env = \"A_KEY\""), &variables).await;
    let complete = async |http: &str| {
        let request = completion(&json!({"prompt": "a"}));
        assert_eq!(request.send_to(http).await.status, 200);
    };
    complete(&gateway.http).await;
    for text in ["sk-1", "sk-2\n"] {
        std::fs::write(&key, text).expect("a file");
        gateway.reload(&from_file, "were reloaded").await;
        complete(&gateway.http).await;
    }
    let received = engine.received().into_iter();
    let keys: Vec<_> = received
        .filter_map(|it| it.header("authorization").map(str::to_owned))
        .collect();
    assert_eq!(keys, ["Bearer sk-0", "Bearer sk-1", "Bearer sk-2"]);
    assert_eq!(gateway.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn hangup_neither_stops_nor_changes_a_server_without_a_file_to_reload() {
    let (mut engine, [http, grpc]) = start_server(&["--drain-grace", "0"]).await;
    let mut gateway = gateway_program().args(["--engine", &grpc]).start();
    let gateway_http = wait_until_ready(&mut gateway).await;
    let http = http
        .strip_prefix("http://")
        .expect("a TCP address")
        .to_owned();
    for (running, reason, http) in [
        (&mut engine, "only a gateway reloads its settings", http),
        (
            &mut gateway,
            "there is no settings file to reload",
            gateway_http,
        ),
    ] {
        running.signal(Signal::HUP);
        running.wait_for_log(reason).await;
        assert_eq!(get("/health").send_to(&http).await.status, 200);
    }
    assert_eq!(gateway.interrupt().await, Some(0));
    assert_eq!(engine.interrupt().await, Some(0));
}
