//! `tokenway` as a process: its output, its addresses and its exit codes.

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::http::{BodyEnd, completion, get};
use support::program::{Program, tokenway};
use support::running_program::RunningProgram;
use support::{Setup, full_speed, silent_at};

const FREE_PORT: &str = "127.0.0.1:0";

/// Starts a server. Returns the process and the addresses of its `listeners` listeners, which it prints.
async fn start_and_read_addresses(
    program: Program,
    listeners: usize,
) -> (RunningProgram, Vec<String>) {
    let mut running = program.start();
    let mut addresses = Vec::new();
    for _ in 0..listeners {
        let line = running.read_line().await;
        let address = line.split_whitespace().nth(1).expect("an address");
        addresses.push(address.to_owned());
    }
    assert!(running.read_line().await.starts_with("ready "));
    (running, addresses)
}

fn serve_program() -> Program {
    let listen = [
        "serve",
        "--http-listen",
        FREE_PORT,
        "--grpc-listen",
        FREE_PORT,
    ];
    tokenway().args(listen).args(["--drain-grace", "0"])
}

fn host_and_port(url: &str) -> &str {
    url.strip_prefix("http://").expect("a TCP address")
}

async fn complete(arguments: &[&str]) -> String {
    let program = tokenway().args(["complete", "one two"]).args(arguments);
    program.run().await.expect_success()
}

#[tokio::test]
async fn serve_prints_its_addresses_and_complete_streams_over_both_apis() {
    let program = serve_program().env("TEST_RUNNER_FREQUENCY_MS", "0");
    let (running, addresses) = start_and_read_addresses(program, 2).await;
    let [http, grpc] = &addresses[..] else {
        panic!("expected two addresses")
    };
    let expected = "token_0token_1token_2\n";
    let three = ["--max-tokens", "3", "--server"];
    assert_eq!(complete(&[&three[..], &[http]].concat()).await, expected);
    assert_eq!(
        complete(&[&three[..], &[grpc, "--grpc"]].concat()).await,
        expected
    );
    assert_eq!(running.interrupt().await, Some(0));
}

#[tokio::test]
async fn serve_is_the_default_command() {
    let program = tokenway().args(["--http-listen", FREE_PORT, "--grpc-listen", FREE_PORT]);
    let (running, addresses) = start_and_read_addresses(program, 2).await;
    let mut health = get("/health").send_to(host_and_port(&addresses[0])).await;
    assert_eq!(
        health.read_rest().await.json(),
        json!({"status": "healthy"})
    );
    drop(health);
    assert_eq!(running.interrupt().await, Some(0));
}

#[tokio::test]
async fn a_worker_process_gets_the_settings_of_its_model() {
    let program = serve_program().args(["--isolation", "process", "--test-runner-fail-at", "2"]);
    let program = program.env("TEST_RUNNER_FREQUENCY_MS", "0");
    let (running, addresses) = start_and_read_addresses(program, 2).await;
    let arguments = ["complete", "a", "--server", &addresses[0]];
    let outcome = tokenway().args(arguments).run().await;
    assert_eq!(outcome.stdout, "token_0token_1", "{outcome:?}");
    assert_eq!(running.interrupt().await, Some(0));
}

#[tokio::test]
async fn a_gateway_serves_an_engine_behind_a_unix_socket() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("engine.sock").display());
    let engine = tokenway().args(["engine", "--grpc-listen", &socket, "--drain-grace", "0"]);
    let (engine, addresses) =
        start_and_read_addresses(engine.env("TEST_RUNNER_FREQUENCY_MS", "0"), 1).await;
    assert_eq!(addresses, [socket.as_str()]);
    let http = format!("unix:{}", folder.path().join("http.sock").display());
    let gateway = tokenway().args(["gateway", "--engine", &socket, "--http-listen", &http]);
    let grpc = format!("unix:{}", folder.path().join("grpc.sock").display());
    let gateway = gateway.args(["--grpc-listen", &grpc, "--drain-grace", "0"]);
    let mut gateway = gateway.start();
    assert!(gateway.read_line().await.starts_with("HTTP "));
    let line = gateway.read_line().await;
    assert!(line.starts_with(&format!("gRPC     {grpc} ")), "{line}");
    assert!(gateway.read_line().await.starts_with("waiting "));
    assert_eq!(
        gateway.read_line().await,
        format!("ready    in front of {socket}")
    );
    let printed = complete(&["--max-tokens", "2", "--server", &http]).await;
    assert_eq!(printed, "token_0token_1\n");
    for server in [&grpc, &socket] {
        let printed = complete(&["--max-tokens", "2", "--grpc", "--server", server]).await;
        assert_eq!(printed, "token_0token_1\n");
    }
    assert_eq!(gateway.interrupt().await, Some(0));
    assert_eq!(engine.interrupt().await, Some(0));
}

#[tokio::test]
async fn a_gateway_prints_waiting_until_its_engine_is_up() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = format!("unix:{}", folder.path().join("engine.sock").display());
    let gateway = tokenway().args(["gateway", "--engine", &socket, "--http-listen", FREE_PORT]);
    let gateway = gateway.args(["--grpc-listen", FREE_PORT, "--drain-grace", "0"]);
    let mut gateway = gateway.start();
    assert!(gateway.read_line().await.starts_with("HTTP "));
    assert!(gateway.read_line().await.starts_with("gRPC "));
    assert_eq!(
        gateway.read_line().await,
        format!("waiting  for an engine: {socket}")
    );
    let engine = tokenway().args(["engine", "--grpc-listen", &socket, "--drain-grace", "0"]);
    let (engine, _) = start_and_read_addresses(engine, 1).await;
    assert_eq!(
        gateway.read_line().await,
        format!("ready    in front of {socket}")
    );
    assert_eq!(gateway.interrupt().await, Some(0));
    assert_eq!(engine.interrupt().await, Some(0));
}

#[tokio::test]
async fn sigterm_lets_a_running_stream_finish() {
    let program = serve_program().env("TEST_RUNNER_FREQUENCY_MS", "5");
    let (mut running, addresses) = start_and_read_addresses(program, 2).await;
    let body = json!({"prompt": "a", "max_tokens": 50, "stream": true});
    let mut stream = completion(&body)
        .send_to(host_and_port(&addresses[0]))
        .await;
    assert!(stream.read_line().await.is_some());
    running.signal(Signal::TERM);
    assert!(running.read_line().await.starts_with("draining "));
    let rest = stream.read_rest().await;
    assert_eq!((rest.end, rest.lines().len()), (BodyEnd::Clean, 49));
    drop(stream);
    assert_eq!(running.wait_for_exit_code().await, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_the_server_at_once() {
    let program = serve_program().args(["--drain-timeout", "3600", "--test-runner-silent-at", "1"]);
    let program = program.env("TEST_RUNNER_FREQUENCY_MS", "0");
    let (mut running, addresses) = start_and_read_addresses(program, 2).await;
    let body = json!({"prompt": "a", "stream": true});
    let mut stream = completion(&body)
        .send_to(host_and_port(&addresses[0]))
        .await;
    assert!(stream.read_line().await.is_some());
    running.signal(Signal::TERM);
    assert!(running.read_line().await.starts_with("draining "));
    assert_eq!(running.interrupt().await, Some(1));
    assert_eq!(stream.read_rest().await.end, BodyEnd::Unclean);
}

#[tokio::test]
async fn invalid_settings_end_with_their_exit_code() {
    for (arguments, code, expected) in [
        (&["serve", "--slots", "0"][..], 2, "--slots"),
        (&["serve", "--http-listen", "0.0.0.0:0"], 2, "--insecure"),
        (
            &["serve", "--http-listen", "host.invalid:1", "--insecure"],
            1,
            "host.invalid:1",
        ),
        (&["gateway"], 2, "--engine"),
        (&["complete"], 2, "PROMPT"),
    ] {
        let outcome = tokenway().args(arguments).run().await;
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(outcome.stderr.contains(expected), "{outcome:?}");
    }
}

#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn an_unusable_model_is_rejected_before_anything_listens() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = folder.path().join("text.gguf").display().to_string();
    std::fs::write(&text, "not a model").expect("a file");
    let gguf = folder.path().join("model.gguf").display().to_string();
    std::fs::write(&gguf, "GGUF").expect("a file");
    for (arguments, expected) in [
        (
            &["--model-path", "/nowhere.gguf"][..],
            "--model-path /nowhere.gguf: the model file cannot be read",
        ),
        (
            &["--model-path", &text],
            "text.gguf: this is not a GGUF model file; give a GGUF file, or hf:",
        ),
        (&["--model-path", &gguf, "--slots", "257"], "--slots"),
    ] {
        let outcome = serve_program().args(arguments).run().await;
        assert_eq!(
            (outcome.code, &*outcome.stdout),
            (Some(2), ""),
            "{outcome:?}"
        );
        assert!(outcome.stderr.contains(expected), "{outcome:?}");
    }
}

#[tokio::test]
async fn an_invalid_log_filter_is_rejected() {
    let outcome = serve_program()
        .env("TOKENWAY_LOG", "tokenway=loud")
        .run()
        .await;
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("TOKENWAY_LOG"), "{outcome:?}");
}

/// Returns a server program on free ports, with one more setting.
fn serve_with(setting: &str, value: &str) -> Program {
    let flags = ["--http-listen", "--grpc-listen"];
    let free = flags.into_iter().filter(|flag| *flag != setting);
    let program = free.fold(tokenway().arg("serve"), |program, flag| {
        program.args([flag, FREE_PORT])
    });
    program.args([setting, value])
}

#[tokio::test]
async fn an_address_in_use_is_reported_with_its_flag() {
    let server = Setup::test_runner(full_speed()).start().await;
    let taken = server.http_address();
    for setting in ["--http-listen", "--grpc-listen"] {
        let failure = serve_with(setting, &taken).run().await.expect_failure();
        assert!(failure.contains(&taken), "{failure}");
        let expected = format!("choose another address with {setting}");
        assert!(failure.contains(&expected), "{failure}");
    }
}

#[tokio::test]
async fn complete_reports_every_failure_with_exit_code_1() {
    let server = Setup::test_runner(silent_at(2)).start().await;
    let (http, grpc) = (server.http_url(), server.grpc_url());
    for (arguments, expected) in [
        (
            &["--server", &http, "--model", "nobody"][..],
            "model_not_found",
        ),
        (
            &["--server", &grpc, "--grpc", "--model", "nobody"],
            "model_not_found",
        ),
        (&["--server", &grpc], "add --grpc"),
        (&["--server", &http, "--grpc"], "leave out --grpc"),
        (&["--server", "ftp://a"], "ftp://a"),
        (&["--server", "unix:/nowhere.sock"], "/nowhere.sock"),
        (
            &["--server", "unix:/nowhere.sock", "--grpc"],
            "/nowhere.sock",
        ),
    ] {
        let program = tokenway().args(["complete", "a"]).args(arguments);
        let failure = program.run().await.expect_failure();
        assert!(failure.contains(expected), "{failure}");
    }
}

#[tokio::test]
async fn complete_prints_the_tokens_before_a_failure_and_then_the_error() {
    for api in [&["--http"][..], &["--grpc"]] {
        let options = tokenway::runner::llm_test::TestRunnerOptions {
            fail_at: Some(2),
            ..full_speed()
        };
        let server = Setup::test_runner(options).start().await;
        let url = if api == ["--grpc"] {
            server.grpc_url()
        } else {
            server.http_url()
        };
        let program = tokenway()
            .args(["complete", "a", "--server", &url])
            .args(api);
        let outcome = program.run().await;
        assert_eq!(outcome.stdout, "token_0token_1");
        assert!(outcome.expect_failure().contains("internal_error"));
    }
}

#[tokio::test]
async fn no_prompt_completion_or_user_is_in_any_log_or_metric() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("log");
    let program = serve_program()
        .args(["--test-runner-fail-at", "3"])
        .log_to(&log);
    let program = program.env("TOKENWAY_LOG", "debug,tokenway=trace");
    let (running, addresses) =
        start_and_read_addresses(program.env("TEST_RUNNER_FREQUENCY_MS", "0"), 2).await;
    let [http, grpc] = &addresses[..] else {
        panic!("expected two addresses")
    };
    // The requests are: a completion that succeeds, a completion that fails, and an invalid request.
    for body in [
        json!({"prompt": "canary", "user": "canary", "max_tokens": 2}),
        json!({"prompt": "canary", "user": "canary", "max_tokens": 9, "stream": true}),
        json!({"prompt": ["canary", 1]}),
    ] {
        let mut response = completion(&body).send_to(host_and_port(http)).await;
        response.read_rest().await;
    }
    let arguments = ["complete", "canary", "--grpc", "--server", grpc];
    let failed = tokenway().args(arguments).run().await;
    assert_eq!(failed.stdout, "token_0token_1token_2");
    let mut metrics = get("/metrics").send_to(host_and_port(http)).await;
    let metrics = metrics.read_rest().await.text;
    assert_eq!(running.interrupt().await, Some(0));
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(
        log.contains("the model failed on a sequence"),
        "nothing was logged: {log}"
    );
    for secret in ["canary", "token_0", "token_1"] {
        assert!(!log.contains(secret), "{log}");
        assert!(!metrics.contains(secret), "{metrics}");
    }
}
