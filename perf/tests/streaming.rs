//! What `tokenway-perf streaming` prints and how it exits, over doors that do as they should; `faults`
//! has those that do not.

use std::process::Stdio;

use support::{Setup, TestServer, full_speed};
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpListener;

use program::{outcome, run, run_at_full_speed, streaming};

mod doors;
mod faults;
mod program;
#[path = "../../tests/support/mod.rs"]
mod support;

async fn start(options: TestRunnerOptions) -> TestServer {
    Setup::test_runner(options).start().await
}

#[tokio::test]
async fn both_doors_of_its_own_server_are_measured_without_a_word_on_standard_error() {
    let arguments = [
        "--tokens",
        "100",
        "--interval-ms",
        "2",
        "--max-overhead-ms",
        "60000",
    ];
    let outcome = run(&arguments).await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (Some(0), ""),
        "{outcome}"
    );
    for door in ["HTTP", "gRPC"] {
        let figures = outcome.figures(door);
        figures.assert_consistent(100.0, 2.0);
        let names: Vec<_> = figures
            .rest
            .iter()
            .map(|line| {
                let (name, values) = line.split_once(": ").expect("a name and its values");
                let values: Vec<_> = values.split(", ").collect();
                let [p50, p90, p99, max] = values[..] else {
                    panic!("{line}")
                };
                for (value, label) in [(p50, "p50 "), (p90, "p90 "), (p99, "p99 "), (max, "max ")] {
                    let value = value.strip_prefix(label).expect(line);
                    let value = value.strip_suffix(" µs").expect(line);
                    assert!(value.parse::<f64>().expect(line) >= 0.0);
                }
                name
            })
            .collect();
        let expected = [
            "One-way latency (received - emitted)",
            "Schedule lateness (received - due)",
            "Runner lateness (emitted - due)",
        ];
        assert_eq!(names, expected, "{outcome}");
    }
}

#[tokio::test]
async fn one_door_can_be_chosen() {
    let outcome = run_at_full_speed("5000", &["--door", "grpc"]).await;
    assert_eq!(outcome.code, Some(0), "{outcome}");
    outcome.figures("gRPC").assert_consistent(5000.0, 0.0);
    assert!(!outcome.out.contains("HTTP at"), "{outcome}");
}

#[tokio::test]
async fn an_overhead_above_the_limit_fails_and_says_by_how_much() {
    let arguments = [
        "--tokens",
        "10",
        "--interval-ms",
        "2",
        "--max-overhead-ms=-1000",
    ];
    let outcome = run(&arguments).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let expected: Vec<_> = ["HTTP", "gRPC"]
        .map(|door| {
            let overhead_ms = outcome.figures(door).overhead_ms;
            format!(
                "error: {door}: the overhead of {overhead_ms:.2} ms per token is above the -1000 \
                 ms of --max-overhead-ms"
            )
        })
        .into();
    assert_eq!(outcome.err.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn the_references_environment_variables_are_read() {
    let server = start(full_speed()).await;
    let mut command = streaming(&["--tokens", "10"]);
    command.env("SERVER_BASE_URL", server.http_url());
    command.env("TEST_RUNNER_FREQUENCY_MS", "0.5");
    command.env("TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS", "-2000");
    let outcome = outcome(command).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    outcome.figures("HTTP").assert_consistent(10.0, 0.5);
    let measured = format!("HTTP at {}\n", server.http_url());
    assert!(outcome.out.contains(&measured), "{outcome}");
    assert!(outcome.err.contains("the -2000 ms of"), "{outcome}");
}

#[tokio::test]
async fn a_running_server_is_measured_through_the_doors_that_are_given() {
    let server = start(full_speed()).await;
    let (http, grpc) = (server.http_url(), server.grpc_url());
    let grpc = grpc.trim_start_matches("http://");
    let http_only = run_at_full_speed("100", &["--http", &http]).await;
    assert_eq!(http_only.code, Some(0), "{http_only}");
    http_only.figures("HTTP").assert_consistent(100.0, 0.0);
    let told = "The gRPC door is not measured: no address was given.";
    assert!(http_only.out.contains(told), "{http_only}");
    assert!(!http_only.out.contains("gRPC at"), "{http_only}");
    let grpc_only = run_at_full_speed("100", &["--grpc", grpc]).await;
    assert_eq!(grpc_only.code, Some(0), "{grpc_only}");
    grpc_only.figures("gRPC").assert_consistent(100.0, 0.0);
    let told = "The HTTP door is not measured: no address was given.";
    assert!(grpc_only.out.contains(told), "{grpc_only}");
    let both = ["--http", &http, "--grpc", grpc, "--model", "llm_test"];
    let both = run_at_full_speed("100", &both).await;
    assert_eq!(both.code, Some(0), "{both}");
    both.figures("HTTP").assert_consistent(100.0, 0.0);
    both.figures("gRPC").assert_consistent(100.0, 0.0);
}

#[tokio::test]
async fn the_model_that_is_named_is_the_one_asked_for() {
    let outcome = run_at_full_speed("2", &["--model", "another"]).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let errors: Vec<_> = outcome.err.lines().collect();
    let [http, grpc] = errors[..] else {
        panic!("{outcome}")
    };
    assert!(http.starts_with("error: HTTP: the server refused: 404 Not Found: "));
    assert!(http.ends_with("(model_not_found)"), "{http}");
    assert!(grpc.starts_with("error: gRPC: the server refused: NotFound: "));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_with_its_address() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let url = format!("http://{address}");
    let outcome = run_at_full_speed("2", &["--http", &url, "--grpc", &address]).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let expected = ["HTTP", "gRPC"].map(|door| {
        format!("error: {door}: cannot connect to {address}: Connection refused (os error 111)")
    });
    assert_eq!(outcome.err.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn wrong_arguments_are_told_by_name() {
    let table: [(&[&str], &str); 7] = [
        (&["--tokens", "1"], "--tokens"),
        (&["--interval-ms=-1"], "--interval-ms"),
        (&["--max-overhead-ms", "NaN"], "--max-overhead-ms"),
        (&["--http", "https://127.0.0.1"], "--http"),
        (&["--grpc", "a b"], "--grpc"),
        (&["--door", "window"], "--door"),
        (
            &["--door", "grpc", "--http", "http://127.0.0.1:1"],
            "--grpc",
        ),
    ];
    for (arguments, name) in table {
        let outcome = run(arguments).await;
        assert_eq!(outcome.code, Some(2), "{arguments:?} {outcome}");
        assert!(outcome.err.contains(name), "{arguments:?} {outcome}");
        assert_eq!(outcome.out, "", "{arguments:?}");
    }
}

#[tokio::test]
async fn its_own_server_ends_with_it_also_when_it_is_killed() {
    let mut command = streaming(&["--interval-ms", "60000"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = command.spawn().unwrap();
    let mut first_line = String::new();
    let mut out = BufReader::new(program.stdout.take().unwrap());
    out.read_line(&mut first_line).await.unwrap();
    assert_eq!(first_line, "Measuring a server of this test's own.\n");
    program.kill().await.unwrap();
    // The server has inherited standard error: its end is the end of both.
    let mut err = String::new();
    let mut stderr = program.stderr.take().unwrap();
    stderr.read_to_string(&mut err).await.unwrap();
    assert_eq!(err, "");
}

#[tokio::test]
async fn an_error_in_the_stream_is_told_with_its_place_on_both_doors() {
    let failing = TestRunnerOptions {
        fail_at: Some(5),
        ..full_speed()
    };
    let server = start(failing).await;
    let (http, grpc) = (server.http_url(), server.grpc_url());
    let outcome = run_at_full_speed("10", &["--http", &http, "--grpc", &grpc]).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let errors: Vec<_> = outcome.err.lines().collect();
    let [http, grpc] = errors[..] else {
        panic!("{outcome}")
    };
    let reason = "the stream ended with an error after 5 tokens: ";
    assert!(
        http.starts_with(&format!("error: HTTP: {reason}")),
        "{http}"
    );
    assert!(
        grpc.starts_with(&format!("error: gRPC: {reason}")),
        "{grpc}"
    );
}
