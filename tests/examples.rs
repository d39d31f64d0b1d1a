//! Every example does what its header says, and reports failures with exit code 1.

mod support;

use std::time::Duration;

use serde_json::json;
use support::http::{BodyEnd, post, texts};
use support::program::{Program, example, header_arguments, python};
use support::running_program::RunningProgram;
use support::{Setup, TestServer, foreign_server, full_speed, grpc};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::runner::llm_test::TestRunnerOptions;
use tokio::net::TcpSocket;

/// Returns the text of the test runner's first `count` tokens.
fn expected_text(count: usize) -> String {
    (0..count).map(|index| format!("token_{index}")).collect()
}

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// Starts a server on which every stream fails in place of token 3.
async fn failing_server() -> TestServer {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    Setup::test_runner(options).start().await
}

/// Returns an address that refuses connections. The socket keeps the address reserved.
fn unreachable_address() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().expect("a socket");
    let any_port = "127.0.0.1:0".parse().expect("an address");
    socket.bind(any_port).expect("a free port exists");
    let address = socket
        .local_addr()
        .expect("the listener is bound")
        .to_string();
    (socket, address)
}

/// Returns a Rust example with the arguments from its header.
fn rust_example(name: &str) -> Program {
    let command = format!("cargo run --example {name} -- ");
    example(name).args(header_arguments(&format!("examples/{name}.rs"), &command))
}

/// Returns a Python example with the arguments from its header.
fn python_example(name: &str) -> Program {
    let source = format!("examples/{name}.py");
    let arguments = header_arguments(&source, &format!("python {source} "));
    python(&source).args(arguments)
}

#[tokio::test]
async fn http_stream_prints_every_token_and_the_finish_reason() {
    let server = server().await;
    let example = rust_example("http_stream")
        .arg("--url")
        .arg(server.http_url());
    let printed = example.run().await.expect_success();
    assert_eq!(printed, expected_text(32) + "\nfinish reason: length\n");
}

#[tokio::test]
async fn http_stream_reports_an_error_record_after_its_last_token() {
    let server = failing_server().await;
    let example = rust_example("http_stream")
        .arg("--url")
        .arg(server.http_url());
    let outcome = example.run().await;
    assert_eq!(outcome.stdout, expected_text(3));
    assert!(outcome.expect_failure().contains("(internal_error)"));
}

#[tokio::test]
async fn http_stream_reports_a_truncated_stream() {
    let example = rust_example("http_stream")
        .arg("--url")
        .arg(foreign_server::http().await);
    let outcome = example.run().await;
    assert_eq!(outcome.stdout, expected_text(1));
    assert!(outcome.expect_failure().contains("it was truncated"));
}

#[tokio::test]
async fn http_stream_reports_a_rejected_request() {
    let server = server().await;
    let example = example("http_stream").args(["a prompt", "--max-tokens=2000000", "--url"]);
    let failure = example.arg(server.http_url()).run().await.expect_failure();
    assert!(failure.contains("400 Bad Request"), "{failure}");
    assert!(failure.contains("(context_length_exceeded)"), "{failure}");
}

#[tokio::test]
async fn http_stream_reports_an_unreachable_server() {
    let (_socket, address) = unreachable_address();
    let url = format!("http://{address}");
    let failure = rust_example("http_stream")
        .arg("--url")
        .arg(&url)
        .run()
        .await
        .expect_failure();
    assert!(
        failure.contains(&format!("no answer from {url}")),
        "{failure}"
    );
    assert!(failure.contains("Connection refused"), "{failure}");
    assert!(failure.contains("`make run`"), "{failure}");
}

#[tokio::test]
async fn grpc_stream_prints_every_token_and_then_usage_and_timings() {
    let server = server().await;
    let example = rust_example("grpc_stream")
        .arg("--url")
        .arg(server.grpc_url());
    let printed = example.run().await.expect_success();
    let lines: Vec<_> = printed.lines().collect();
    let expected = [
        &*expected_text(32),
        "finish reason: length",
        "usage: 5 prompt tokens, 32 completion tokens",
    ];
    assert_eq!(lines[..3], expected);
    assert!(lines[3].starts_with("timings: "), "{printed}");
    assert_eq!(lines.len(), 4);
}

#[tokio::test]
async fn grpc_stream_reports_an_error_after_its_last_token() {
    let server = failing_server().await;
    let example = rust_example("grpc_stream")
        .arg("--url")
        .arg(server.grpc_url());
    let outcome = example.run().await;
    assert_eq!(outcome.stdout, expected_text(3));
    assert!(outcome.expect_failure().contains("(internal_error)"));
}

#[tokio::test]
async fn grpc_stream_reports_a_stream_without_a_summary() {
    let url = format!("http://{}", foreign_server::grpc().await);
    let outcome = rust_example("grpc_stream")
        .arg("--url")
        .arg(url)
        .run()
        .await;
    assert_eq!(outcome.stdout, expected_text(1));
    assert!(outcome.expect_failure().contains("it was truncated"));
}

#[tokio::test]
async fn grpc_stream_sends_its_deadline() {
    let mut setup = Setup::test_runner(support::silent_at(3));
    setup.parts.request_timeout = Duration::from_secs(3_600);
    let server = setup.start().await;
    let example = rust_example("grpc_stream")
        .arg("--url")
        .arg(server.grpc_url());
    let outcome = example.arg("--timeout=1").run().await;
    assert_eq!(outcome.stdout, expected_text(3));
    assert!(outcome.expect_failure().contains("(deadline_exceeded)"));
}

#[tokio::test]
async fn grpc_stream_reports_an_unreachable_server() {
    let (_socket, address) = unreachable_address();
    let url = format!("http://{address}");
    let failure = rust_example("grpc_stream")
        .arg("--url")
        .arg(&url)
        .run()
        .await
        .expect_failure();
    assert!(
        failure.contains(&format!("no answer from {url}")),
        "{failure}"
    );
    assert!(failure.contains("Connection refused"), "{failure}");
    assert!(failure.contains("`make run`"), "{failure}");
}

/// Starts the custom runner on free ports. Returns the process and the addresses of its HTTP and gRPC APIs.
async fn start_custom_runner() -> (RunningProgram, String, String) {
    let free = "127.0.0.1:0";
    let program = example("custom_runner").args(["--http-listen", free, "--grpc-listen", free]);
    let mut running = program.args(["--interval-ms", "1"]).start();
    let line = running.read_line().await;
    let urls: Vec<_> = line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("http://"))
        .map(|address| address.trim_end_matches(',').to_owned())
        .collect();
    let [http, grpc] = urls.try_into().expect("two addresses");
    (running, http, grpc)
}

/// Returns the request body of the curl command in the custom runner's header.
fn curl_body() -> String {
    let arguments = header_arguments("examples/custom_runner.rs", "curl ");
    let data = arguments.iter().position(|argument| argument == "-d");
    arguments[data.expect("the command has -d") + 1].clone()
}

#[tokio::test]
async fn custom_runner_echoes_the_prompt_over_http_until_interrupted() {
    let (running, run_http, _) = start_custom_runner().await;
    let request = post("/v1/completions", curl_body()).accept("*/*");
    let mut response = request.send_to(&run_http).await;
    assert_eq!(response.status, 200);
    let body = response.read_rest().await;
    assert_eq!(body.end, BodyEnd::Clean);
    let lines = body.lines();
    let mut expected: Vec<_> = "The capital of France is"
        .chars()
        .map(String::from)
        .collect();
    expected.push(String::new());
    assert_eq!(texts(&lines, 0), expected);
    let last = lines.last().expect("a line");
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["model"], "echo");
    // Drop the response: the drain waits briefly for a client that may still be reading.
    drop(response);
    assert_eq!(running.interrupt().await, Some(0));
}

#[tokio::test]
async fn custom_runner_echoes_the_prompt_over_grpc_until_interrupted() {
    let (running, _, grpc) = start_custom_runner().await;
    let mut client = InferenceClient::connect(format!("http://{grpc}"))
        .await
        .expect("the server accepts connections");
    let mut request = grpc::request("Grüße, 東京", 64);
    request.n = Some(2);
    let stream = client
        .complete(request)
        .await
        .expect("the request is admitted");
    let completion = grpc::collect(stream.into_inner()).await;
    for choice in 0..2 {
        assert_eq!(completion.texts(choice).concat(), "Grüße, 東京");
        assert_eq!(completion.choices[choice].finish, v1::FinishReason::Stop);
    }
    let usage = completion.usage();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (9, 2 * 10));
    assert_eq!(running.interrupt().await, Some(0));
}

#[tokio::test]
async fn custom_runner_ends_a_request_at_max_tokens() {
    let (_running, run_http, _) = start_custom_runner().await;
    let body = json!({"prompt": "The capital", "max_tokens": 3});
    let mut response = post("/v1/completions", body.to_string())
        .send_to(&run_http)
        .await;
    let answer = response.read_rest().await.json();
    assert_eq!(answer["choices"][0]["text"], "The");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn custom_runner_reports_an_address_in_use() {
    let (_running, run_http, _) = start_custom_runner().await;
    let second =
        example("custom_runner").args(["--http-listen", &run_http, "--grpc-listen", "127.0.0.1:0"]);
    let failure = second.run().await.expect_failure();
    assert!(
        failure.contains(&format!("cannot listen on {run_http}")),
        "{failure}"
    );
}

#[tokio::test]
async fn the_python_grpc_client_prints_every_token_and_then_usage_and_timings() {
    let server = server().await;
    let example = python_example("python_grpc_client").arg("--address");
    let printed = example
        .arg(server.grpc_address())
        .run()
        .await
        .expect_success();
    let lines: Vec<_> = printed.lines().collect();
    let expected = [
        &*expected_text(32),
        "usage: 5 prompt tokens, 32 completion tokens",
    ];
    assert_eq!(lines[..2], expected);
    assert!(lines[2].starts_with("timings: "), "{printed}");
    assert_eq!(lines.len(), 3);
}

#[tokio::test]
async fn the_python_grpc_client_reports_an_error_by_its_reason() {
    let server = failing_server().await;
    let example = python_example("python_grpc_client").arg("--address");
    let outcome = example.arg(server.grpc_address()).run().await;
    assert_eq!(outcome.stdout, expected_text(3));
    assert!(outcome.expect_failure().contains("(internal_error)"));
}

#[tokio::test]
async fn the_python_grpc_client_reports_a_stream_without_a_summary() {
    let example = python_example("python_grpc_client").arg("--address");
    let outcome = example.arg(foreign_server::grpc().await).run().await;
    assert_eq!(outcome.stdout, expected_text(1));
    assert!(outcome.expect_failure().contains("it was truncated"));
}

#[tokio::test]
async fn the_python_grpc_client_sends_no_request_to_a_server_that_is_not_serving() {
    let server = Setup::unloadable().start_loading().await;
    server.wait_until_load_failed().await;
    let example = python_example("python_grpc_client").arg("--address");
    let failure = example
        .arg(server.grpc_address())
        .run()
        .await
        .expect_failure();
    assert_eq!(failure, "error: the server is NOT_SERVING\n");
}

#[tokio::test]
async fn the_python_grpc_client_reports_an_unreachable_server() {
    let (_socket, address) = unreachable_address();
    let example = python_example("python_grpc_client")
        .arg("--address")
        .arg(&address);
    let failure = example.run().await.expect_failure();
    assert!(failure.contains(&address), "{failure}");
    assert!(failure.contains("(UNAVAILABLE)"), "{failure}");
    assert!(failure.contains("`make run`"), "{failure}");
}

#[tokio::test]
async fn the_python_openai_client_prints_a_stream_and_a_unary_completion() {
    let server = server().await;
    let example = python_example("python_openai_client").arg("--url");
    let printed = example.arg(server.http_url()).run().await.expect_success();
    let tokens = expected_text(32);
    let expected = [
        &*tokens,
        "finish reason: length",
        "usage: 5 prompt tokens, 32 completion tokens",
        &format!("unary: {tokens}"),
    ];
    assert_eq!(printed.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn the_python_openai_client_reports_a_failing_stream() {
    let server = failing_server().await;
    let example = python_example("python_openai_client").arg("--url");
    let outcome = example.arg(server.http_url()).run().await;
    assert_eq!(outcome.stdout, expected_text(3));
    assert!(outcome.expect_failure().contains("(internal_error)"));
}

#[tokio::test]
async fn the_python_openai_client_reports_a_truncated_stream() {
    let example = python_example("python_openai_client").arg("--url");
    let outcome = example.arg(foreign_server::http().await).run().await;
    assert_eq!(outcome.stdout, expected_text(1));
    assert!(outcome.expect_failure().contains("it was truncated"));
}

#[tokio::test]
async fn the_python_openai_client_reports_an_unreachable_server() {
    let (_socket, address) = unreachable_address();
    let url = format!("http://{address}");
    let example = python_example("python_openai_client")
        .arg("--url")
        .arg(&url);
    let failure = example.run().await.expect_failure();
    assert!(
        failure.contains(&format!("the connection to {url} failed")),
        "{failure}"
    );
    assert!(failure.contains("`make run`"), "{failure}");
}
