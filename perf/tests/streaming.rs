//! Output and exit codes of `tokenway-perf streaming` with correct servers. `faults.rs` tests faulty servers.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::Stdio;

use support::{RunOutput, ServerProcess, perf_command, run, split_words};

mod support;

/// Figures that the program printed for one API.
struct ApiFigures {
    overhead_ms: f64,
    /// Lines that follow the two lines of the reference system's figures.
    rest: Vec<String>,
}

fn run_streaming(arguments: &str) -> RunOutput {
    run(perf_command(split_words(&format!("streaming {arguments}"))))
}

/// Runs `streaming` at full speed and accepts any overhead.
fn run_at_full_speed(arguments: &str) -> RunOutput {
    run_streaming(&format!(
        "--interval-ms 0 --max-overhead-ms 60000 {arguments}"
    ))
}

/// Parses a line that consists of these texts with numbers between them. Returns the numbers.
fn parse_numbers(line: &str, texts: &[&str]) -> Vec<f64> {
    let mut rest = line.strip_prefix(texts[0]).expect(line);
    let numbers = texts[1..].iter().map(|text| {
        let (number, after) = rest.split_once(text).expect(line);
        rest = after;
        number.parse().expect(line)
    });
    let numbers = numbers.collect();
    assert_eq!(rest, "", "{line}");
    numbers
}

/// Parses the figures of an API. The two lines of the reference system's figures must have their exact form, and must
/// agree with each other and with the interval.
fn parse_figures(ran: &RunOutput, api: &str, tokens: f64, interval: f64) -> ApiFigures {
    let title = format!("{api} at http://127.0.0.1:");
    let mut lines = ran.out.lines();
    assert!(lines.any(|line| line.starts_with(&title)), "{ran}");
    let metrics = [
        "StreamingMetrics(received_tokens=",
        ", total_streaming_time_ms=",
        ", mean_receive_interval_ms=",
        ", throughput_tokens_per_second=",
        ")",
    ];
    let metrics = parse_numbers(lines.next().expect("its metrics"), &metrics);
    let overhead = ["Overhead per token: ", "ms"];
    let overhead_ms = parse_numbers(lines.next().expect("its overhead"), &overhead)[0];
    let [received, total_ms, interval_ms, throughput] = metrics[..] else {
        panic!("{ran}")
    };
    assert_eq!(received, tokens, "{ran}");
    let expected_ms = interval_ms - interval;
    assert!((overhead_ms - expected_ms).abs() < 0.02, "{ran}");
    let expected_ms = (tokens - 1.0) / throughput * 1e3;
    assert!((total_ms - expected_ms).abs() < 0.02, "{ran}");
    let rest = lines.take_while(|line| !line.is_empty());
    ApiFigures {
        overhead_ms,
        rest: rest.map(str::to_owned).collect(),
    }
}

#[test]
fn both_apis_of_its_own_server_are_measured_without_output_on_standard_error() {
    let ran = run_streaming("--tokens 100 --interval-ms 2 --max-overhead-ms 60000");
    ran.assert_succeeded();
    for api in ["HTTP", "gRPC"] {
        let figures = parse_figures(&ran, api, 100.0, 2.0);
        let names = [
            "One-way latency (received - emitted)",
            "Schedule lateness (received - due)",
            "Runner lateness (emitted - due)",
        ];
        assert_eq!(figures.rest.len(), names.len(), "{ran}");
        for (line, name) in figures.rest.iter().zip(names) {
            let first = format!("{name}: p50 ");
            let texts = [&first, " µs, p90 ", " µs, p99 ", " µs, max ", " µs"];
            assert!(
                parse_numbers(line, &texts).iter().all(|us| *us >= 0.0),
                "{line}"
            );
        }
    }
}

#[test]
fn one_api_can_be_selected() {
    let ran = run_at_full_speed("--tokens 5000 --api grpc");
    ran.assert_succeeded();
    parse_figures(&ran, "gRPC", 5000.0, 0.0);
    assert!(!ran.out.contains("HTTP at"), "{ran}");
}

#[test]
fn an_overhead_above_the_limit_fails_with_its_amount() {
    let ran = run_streaming("--tokens 10 --interval-ms 2 --max-overhead-ms=-1000");
    assert_eq!(ran.code, Some(1), "{ran}");
    let expected = ["HTTP", "gRPC"].map(|api| {
        let overhead_ms = parse_figures(&ran, api, 10.0, 2.0).overhead_ms;
        format!(
            "error: {api}: the overhead of {overhead_ms:.2} ms per token is above the -1000 ms of \
             --max-overhead-ms"
        )
    });
    assert_eq!(ran.err.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn the_references_environment_variables_are_read() {
    let server = ServerProcess::start(0);
    let mut command = perf_command(split_words("streaming --tokens 10"));
    command.env("SERVER_BASE_URL", server.url());
    command.env("TEST_RUNNER_FREQUENCY_MS", "0.5");
    command.env("TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS", "-2000");
    let ran = run(command);
    assert_eq!(ran.code, Some(1), "{ran}");
    parse_figures(&ran, "HTTP", 10.0, 0.5);
    let title = format!("HTTP at {}\n", server.url());
    assert!(ran.out.contains(&title), "{ran}");
    assert!(ran.err.contains("the -2000 ms of"), "{ran}");
}

#[test]
fn a_running_server_is_measured_through_the_given_apis() {
    let server = ServerProcess::start(0);
    let (url, grpc) = (server.url(), &server.grpc);
    for (given, measured, other) in [
        (format!("--http {url}"), "HTTP", "gRPC"),
        (format!("--grpc {grpc}"), "gRPC", "HTTP"),
    ] {
        let ran = run_at_full_speed(&format!("--tokens 100 {given}"));
        ran.assert_succeeded();
        parse_figures(&ran, measured, 100.0, 0.0);
        let missing = format!("The {other} API is not measured: no address was given.");
        assert!(ran.out.contains(&missing), "{ran}");
        assert!(!ran.out.contains(&format!("{other} at")), "{ran}");
    }
    let both = format!("--tokens 100 --http {url} --grpc {grpc} --model llm_test");
    let ran = run_at_full_speed(&both);
    ran.assert_succeeded();
    for api in ["HTTP", "gRPC"] {
        parse_figures(&ran, api, 100.0, 0.0);
    }
}

#[test]
fn the_given_model_is_requested() {
    let ran = run_at_full_speed("--tokens 2 --model another");
    assert_eq!(ran.code, Some(1), "{ran}");
    let errors: Vec<_> = ran.err.lines().collect();
    let [http, grpc] = errors[..] else {
        panic!("{ran}")
    };
    let refused = "the server refused:";
    let reason = format!("error: HTTP: {refused} 404 Not Found: ");
    assert!(http.starts_with(&reason), "{ran}");
    assert!(http.ends_with("(model_not_found)"), "{ran}");
    let reason = format!("error: gRPC: {refused} NotFound: ");
    assert!(grpc.starts_with(&reason), "{ran}");
}

#[test]
fn a_server_that_does_not_listen_is_reported_with_its_address() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound").to_string();
    drop(listener);
    let ran = run_at_full_speed(&format!(
        "--tokens 2 --http http://{address} --grpc {address}"
    ));
    assert_eq!(ran.code, Some(1), "{ran}");
    let expected = ["HTTP", "gRPC"].map(|api| {
        format!("error: {api}: cannot connect to {address}: Connection refused (os error 111)")
    });
    assert_eq!(ran.err.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn wrong_arguments_are_refused_with_their_flag() {
    for (arguments, flag) in [
        ("--tokens 1", "--tokens"),
        ("--interval-ms=-1", "--interval-ms"),
        ("--max-overhead-ms NaN", "--max-overhead-ms"),
        ("--http https://127.0.0.1", "--http"),
        ("--grpc https://a", "--grpc"),
        ("--api window", "--api"),
        ("--api grpc --http http://127.0.0.1:1", "--grpc"),
    ] {
        let ran = run_streaming(arguments);
        assert_eq!(ran.code, Some(2), "{arguments}: {ran}");
        assert!(ran.err.contains(flag), "{arguments}: {ran}");
        assert_eq!(ran.out, "", "{arguments}");
    }
}

#[test]
fn its_own_server_ends_with_it_also_if_it_is_killed() {
    let mut command = perf_command(split_words("streaming --interval-ms 60000"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program runs");
    let mut first_line = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("it is piped"));
    out.read_line(&mut first_line).expect("text");
    assert_eq!(first_line, "Measuring a server that this test started.\n");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    // The server has inherited standard error, so standard error closes once both processes have ended.
    let mut err = String::new();
    let mut stderr = child.stderr.take().expect("it is piped");
    stderr.read_to_string(&mut err).expect("text");
    assert_eq!(err, "");
}
