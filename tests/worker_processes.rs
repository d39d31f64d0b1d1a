//! Workers in their own processes, started by the engine or connected to it. Killing or stopping a worker pauses its
//! streams and loses nothing.

mod support;

use futures_util::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rustix::process::{Pid, Signal, getpgid};
use serde_json::json;
use support::grpc::{self, collect_from};
use support::http::{completion, get, texts};
use support::program::{start_server, tokenway};
use support::running_program::{RunningProgram, wait_until_gone};
use support::{Setup, full_speed};
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::server::Isolation;
use tokenway::worker::child;

const STREAMS: usize = 32;
const TOKENS: u32 = 600;

fn expected_tokens() -> Vec<String> {
    (0..TOKENS).map(|index| format!("token_{index}")).collect()
}

/// Settings: three workers, one token per 2 ms, and a heartbeat timeout of 0.5 s.
const THREE_WORKERS: [&str; 8] = [
    "--workers",
    "3",
    "--slots",
    "64",
    "--test-runner-frequency-ms",
    "2",
    "--heartbeat-timeout",
    "0.5",
];

/// Runs streams over both APIs. `faults` lists signals, each with a token index: when a stream reaches the index, the
/// signal is sent to another child. Asserts that every stream is complete. Returns the children that got a signal.
async fn streams_survive(
    server: &RunningProgram,
    [http, grpc_url]: &[String; 2],
    faults: &[(u32, Signal)],
) -> Vec<Pid> {
    let address = http.replace("http://", "");
    let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
    let over_http = (0..STREAMS).map(|_| async {
        let mut response = completion(&body).send_to(&address).await;
        (response.status, response.read_rest().await)
    });
    let client = InferenceClient::connect(grpc_url.clone()).await;
    let client = client.expect("the server accepts connections");
    let over_grpc = (0..STREAMS).map(|_| {
        let mut client = client.clone();
        async move {
            let stream = client.complete(grpc::request("a", TOKENS)).await;
            collect_from(
                stream.expect("the request is admitted").into_inner(),
                |_| (),
            )
            .await
        }
    });
    let faults_count = faults.len();
    let mut children = server.children();
    children.shuffle(&mut StdRng::seed_from_u64(7));
    let mut faults = faults.iter().zip(&children).peekable();
    let with_faults = async {
        let stream = client.clone().complete(grpc::request("a", TOKENS)).await;
        let stream = stream.expect("the request is admitted").into_inner();
        collect_from(stream, |count| {
            if let Some(((_, signal), child)) = faults.next_if(|((at, _), _)| *at < count) {
                server.signal_child(*child, *signal);
            }
        })
        .await
    };
    let (over_http, mut over_grpc, with_faults) =
        tokio::join!(join_all(over_http), join_all(over_grpc), with_faults);
    for (status, body) in over_http {
        assert_eq!(status, 200, "{}", body.text);
        assert_eq!(texts(&body.lines(), 0), expected_tokens());
    }
    over_grpc.push(with_faults);
    for completion in over_grpc {
        assert!(completion.error.is_none(), "{:?}", completion.error);
        assert_eq!(completion.texts(0), expected_tokens());
        assert_eq!(completion.usage().completion_tokens, TOKENS);
    }
    children.truncate(faults_count);
    children
}

async fn metric_value(http: &str, name: &str) -> f64 {
    let mut response = get("/metrics").send_to(&http.replace("http://", "")).await;
    let text = response.read_rest().await.text;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .expect("the metric exists")
        .parse()
        .expect("the value is a number")
}

#[tokio::test]
async fn streams_survive_killed_worker_processes() {
    let arguments = [&["--isolation", "process"], &THREE_WORKERS[..]].concat();
    let (mut server, urls) = start_server(&arguments).await;
    let faults = [(20, Signal::KILL), (200, Signal::KILL), (400, Signal::KILL)];
    for _ in streams_survive(&server, &urls, &faults).await {
        server.wait_for_log("a worker was lost").await;
    }
    assert!(metric_value(&urls[0], "tokenway_resumptions_total").await > 0.0);
    assert_eq!(
        metric_value(&urls[0], "tokenway_workers_lost_total").await,
        3.0
    );
}

#[tokio::test]
async fn streams_survive_a_hung_worker_process_and_it_is_replaced() {
    let arguments = [&["--isolation", "process"], &THREE_WORKERS[..]].concat();
    let (mut server, urls) = start_server(&arguments).await;
    for hung in streams_survive(&server, &urls, &[(20, Signal::STOP)]).await {
        server
            .wait_for_log("the worker sent no message within its heartbeat timeout")
            .await;
        wait_until_gone(hung).await;
        server.wait_for_log("a worker has connected").await;
    }
}

#[tokio::test]
async fn no_worker_process_outlives_its_engine() {
    let (server, _) = start_server(&["--isolation", "process", "--workers", "2"]).await;
    let children = server.children();
    assert_eq!(children.len(), 2);
    server.signal(Signal::KILL);
    let _ = server.wait_for_exit_code().await;
    for child in children {
        wait_until_gone(child).await;
    }
}

#[tokio::test]
async fn worker_processes_have_their_own_process_groups() {
    let (server, _) = start_server(&["--isolation", "process"]).await;
    for child in server.children() {
        assert_eq!(getpgid(Some(child)), Ok(child));
    }
}

#[tokio::test]
async fn worker_processes_end_when_the_engine_drains() {
    let arguments = [
        "--isolation",
        "process",
        "--workers",
        "2",
        "--drain-grace",
        "0",
    ];
    let (server, _) = start_server(&arguments).await;
    let children = server.children();
    assert_eq!(server.interrupt().await, Some(0));
    for child in children {
        wait_until_gone(child).await;
    }
}

#[tokio::test]
async fn streams_survive_a_killed_remote_worker_and_a_new_one_may_join() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("workers.sock").display());
    let arguments = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        &socket,
    ];
    let start_worker = || {
        let arguments = [
            "worker",
            "--engine",
            &*socket,
            "--test-runner-frequency-ms",
            "2",
        ];
        tokenway().args(arguments).start()
    };
    let first = start_worker();
    let (_server, [http, grpc_url]) = start_server(&arguments).await;
    let client = InferenceClient::connect(grpc_url)
        .await
        .expect("the server accepts connections");
    let mut second = None;
    let mut first = Some(first);
    let stream = client.clone().complete(grpc::request("a", TOKENS)).await;
    let stream = stream.expect("the request is admitted").into_inner();
    let completion = collect_from(stream, |count| {
        if count > 20 && second.is_none() {
            second = Some(start_worker());
            first
                .take()
                .expect("the worker is running")
                .signal(Signal::KILL);
        }
    })
    .await;
    assert_eq!(completion.texts(0), expected_tokens());
    assert_eq!(metric_value(&http, "tokenway_resumptions_total").await, 1.0);
}

#[tokio::test]
async fn a_remote_worker_reconnects_to_a_restarted_engine() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("workers.sock").display());
    let _worker = tokenway().args(["worker", "--engine", &socket]).start();
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--drain-grace",
        "0",
    ];
    let arguments = [&attached[..], &["--worker-listen", &socket]].concat();
    for _ in 0..2 {
        // The engine is ready only after the worker has connected.
        let (engine, _) = start_server(&arguments).await;
        assert_eq!(engine.interrupt().await, Some(0));
    }
}

#[tokio::test]
async fn a_worker_process_killed_while_loading_is_restarted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // In its first run, the script kills its own process before it loads anything.
    let script = format!(
        "if mkdir {}; then kill -9 $$; fi; exec {} worker --runner llm_test \"$@\"",
        folder.path().join("was-there").display(),
        env!("CARGO_BIN_EXE_tokenway"),
    );
    let mut setup = Setup::test_runner(full_speed());
    setup.engine().models[0].isolation = Isolation::Process(child::Program {
        path: "/bin/sh".into(),
        arguments: ["-c".into(), script.into(), "sh".into()].into(),
        settings: String::new(),
    });
    let server = setup.start().await;
    let (_, answer) = completion(&json!({"prompt": "a", "max_tokens": 3}))
        .fetch(&server)
        .await;
    assert_eq!(texts(&answer.lines(), 0).concat(), "token_0token_1token_2");
}
