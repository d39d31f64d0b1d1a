//! Workers in processes of their own, started by the engine or attached to it: killed and stopped at seeded
//! moments, they cost their streams a pause and nothing else.

mod support;

use futures_util::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rustix::process::{Pid, Signal, getpgid};
use serde_json::json;
use support::grpc::{self, collect_from};
use support::http::{completion, get, texts};
use support::program::{Running, gone, serving, tokenway};
use support::{Setup, full_speed};
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::server::Isolation;
use tokenway::worker::child;

const STREAMS: usize = 32;
const TOKENS: u32 = 600;

fn tokens() -> Vec<String> {
    (0..TOKENS).map(|index| format!("token_{index}")).collect()
}

/// Three workers, 2 ms a token, found missing within half a second.
const THREE: [&str; 8] = [
    "--workers",
    "3",
    "--slots",
    "64",
    "--test-runner-frequency-ms",
    "2",
    "--heartbeat-timeout",
    "0.5",
];

/// Streams by both doors, while at these tokens of one of them a child gets a signal, each time another. Every stream
/// must be whole. Those children are left.
async fn survives(
    server: &Running,
    [http, door]: &[String; 2],
    faults: &[(u32, Signal)],
) -> Vec<Pid> {
    let address = http.replace("http://", "");
    let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
    let asked = (0..STREAMS).map(|_| async {
        let mut response = completion(&body).send_to(&address).await;
        (response.status, response.rest().await)
    });
    let client = InferenceClient::connect(door.clone()).await;
    let client = client.expect("the gRPC door answers");
    let called = (0..STREAMS).map(|_| {
        let mut client = client.clone();
        async move {
            let stream = client.complete(grpc::request("a", TOKENS)).await;
            collect_from(stream.expect("it is admitted").into_inner(), |_| ()).await
        }
    });
    let faults_count = faults.len();
    let mut children = server.children();
    children.shuffle(&mut StdRng::seed_from_u64(7));
    let mut faults = faults.iter().zip(&children).peekable();
    let watched = async {
        let stream = client.clone().complete(grpc::request("a", TOKENS)).await;
        let stream = stream.expect("it is admitted").into_inner();
        collect_from(stream, |seen| {
            if let Some(((_, signal), child)) = faults.next_if(|((at, _), _)| *at < seen) {
                server.signal_child(*child, *signal);
            }
        })
        .await
    };
    let (asked, mut called, watched) = tokio::join!(join_all(asked), join_all(called), watched);
    for (status, answer) in asked {
        assert_eq!(status, 200, "{}", answer.text);
        assert_eq!(texts(&answer.lines(), 0), tokens());
    }
    called.push(watched);
    for completion in called {
        assert!(completion.error.is_none(), "{:?}", completion.error);
        assert_eq!(completion.texts(0), tokens());
        assert_eq!(completion.usage().completion_tokens, TOKENS);
    }
    children.truncate(faults_count);
    children
}

async fn metric(http: &str, name: &str) -> f64 {
    let mut response = get("/metrics").send_to(&http.replace("http://", "")).await;
    let text = response.rest().await.text;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.expect("it is there").parse().expect("it is a number")
}

#[tokio::test]
async fn streams_survive_children_that_are_killed() {
    let arguments = [&["--isolation", "process"], &THREE[..]].concat();
    let (mut server, doors) = serving(&arguments).await;
    let faults = [(20, Signal::KILL), (200, Signal::KILL), (400, Signal::KILL)];
    for _ in survives(&server, &doors, &faults).await {
        server.logs("a worker was lost").await;
    }
    assert!(metric(&doors[0], "tokenway_resumptions_total").await > 0.0);
    assert_eq!(metric(&doors[0], "tokenway_workers_lost_total").await, 3.0);
}

#[tokio::test]
async fn streams_survive_a_child_that_hangs_and_it_is_replaced() {
    let arguments = [&["--isolation", "process"], &THREE[..]].concat();
    let (mut server, doors) = serving(&arguments).await;
    for hung in survives(&server, &doors, &[(20, Signal::STOP)]).await {
        server.logs("it sent no heartbeat in time").await;
        gone(hung).await;
        server.logs("a worker has dialled in").await;
    }
}

#[tokio::test]
async fn no_child_outlives_its_engine() {
    let (server, _) = serving(&["--isolation", "process", "--workers", "2"]).await;
    let children = server.children();
    assert_eq!(children.len(), 2);
    server.signal(Signal::KILL);
    let _ = server.end().await;
    for child in children {
        gone(child).await;
    }
}

#[tokio::test]
async fn what_ends_an_engine_by_its_process_group_leaves_its_children_to_it() {
    let (server, _) = serving(&["--isolation", "process"]).await;
    for child in server.children() {
        assert_eq!(getpgid(Some(child)), Ok(child));
    }
}

#[tokio::test]
async fn children_end_with_an_engine_that_drains() {
    let arguments = [
        "--isolation",
        "process",
        "--workers",
        "2",
        "--drain-grace",
        "0",
    ];
    let (server, _) = serving(&arguments).await;
    let children = server.children();
    assert_eq!(server.interrupt().await, Some(0));
    for child in children {
        gone(child).await;
    }
}

#[tokio::test]
async fn streams_survive_attached_workers_that_leave_and_others_may_join() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = format!("unix:{}", folder.path().join("workers.sock").display());
    let arguments = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        &socket,
    ];
    let attached = || {
        let arguments = [
            "worker",
            "--engine",
            &*socket,
            "--test-runner-frequency-ms",
            "2",
        ];
        tokenway().args(arguments).start()
    };
    let first = attached();
    let (_server, [http, door]) = serving(&arguments).await;
    let client = InferenceClient::connect(door).await.expect("it answers");
    let mut second = None;
    let mut first = Some(first);
    let stream = client.clone().complete(grpc::request("a", TOKENS)).await;
    let stream = stream.expect("it is admitted").into_inner();
    let completion = collect_from(stream, |seen| {
        if seen > 20 && second.is_none() {
            second = Some(attached());
            first.take().expect("it runs").signal(Signal::KILL);
        }
    })
    .await;
    assert_eq!(completion.texts(0), tokens());
    assert_eq!(metric(&http, "tokenway_resumptions_total").await, 1.0);
}

#[tokio::test]
async fn an_attached_worker_serves_the_engine_that_comes_after_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
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
        // It is ready, and so has the worker.
        let (engine, _) = serving(&arguments).await;
        assert_eq!(engine.interrupt().await, Some(0));
    }
}

#[tokio::test]
async fn a_child_that_is_killed_while_it_loads_is_started_again() {
    let folder = tempfile::tempdir().expect("a folder");
    // The first one does not live to load anything.
    let script = format!(
        "if mkdir {}; then kill -9 $$; fi; exec {} worker --runner llm_test \"$@\"",
        folder.path().join("was-there").display(),
        env!("CARGO_BIN_EXE_tokenway"),
    );
    let mut setup = Setup::test_runner(full_speed());
    setup.engine().models[0].isolation = Isolation::Process(child::Program {
        path: "/bin/sh".into(),
        arguments: ["-c".into(), script.into(), "sh".into()].into(),
    });
    let server = setup.start().await;
    let (_, answer) = completion(&json!({"prompt": "a", "max_tokens": 3}))
        .fetch(&server)
        .await;
    assert_eq!(texts(&answer.lines(), 0).concat(), "token_0token_1token_2");
}
