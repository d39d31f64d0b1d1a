//! The servers that the client cases run against.

use std::ops::Deref;
use std::time::Duration;

use serde_json::json;
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tonic::Streaming;

use super::support::openai_engine::{OpenAiEngine, chat_event, whole_with_usage};
use super::support::program::start_server;
use super::support::running_program::RunningProgram;
use super::support::{Setup, TestServer, full_speed, grpc, silent_at, with_interval};

/// Starts a server in its own process, so that the test can kill it.
pub(super) async fn server_process() -> (RunningProgram, [String; 2]) {
    start_server(&["--test-runner-frequency-ms", "1", "--drain-grace", "0"]).await
}

pub(super) async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// Starts a server on which every stream fails in place of token 10.
pub(super) async fn failing_server() -> TestServer {
    let options = TestRunnerOptions {
        fail_at: Some(10),
        ..full_speed()
    };
    Setup::test_runner(options).start().await
}

/// Starts a server whose model cannot be loaded.
pub(super) async fn unready_server() -> TestServer {
    let server = Setup::unloadable().start_loading().await;
    server.wait_until_load_failed().await;
    server
}

/// Starts a server with one slot that generates one token per millisecond.
pub(super) async fn server_with_one_slot() -> TestServer {
    let runner = with_interval(Duration::from_millis(1));
    Setup::test_runner(runner).slots(1).start().await
}

/// A server whose only slot is occupied.
pub(super) struct OccupiedServer {
    server: TestServer,
    streams: Vec<Streaming<v1::CompletionEvent>>,
}

impl Deref for OccupiedServer {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}

/// Starts a server whose only slot stays occupied for the whole test, so that any request waits in the queue.
pub(super) async fn busy_server() -> OccupiedServer {
    let setup = Setup::test_runner(silent_at(1)).slots(1).queue_depth(2);
    let server = setup.start().await;
    let mut running = server.stream(grpc::request("a", 100)).await;
    let started = running.message().await.expect("the stream continues");
    assert!(started.is_some());
    OccupiedServer {
        server,
        streams: vec![running],
    }
}

/// Starts a server whose queue is full.
pub(super) async fn full_server() -> OccupiedServer {
    let mut busy = busy_server().await;
    for _ in 0..2 {
        let queued = busy.server.stream(grpc::request("a", 100)).await;
        busy.streams.push(queued);
    }
    busy
}

/// A gateway in front of an OpenAI-compatible engine.
pub(super) struct GatewayToEngine {
    gateway: TestServer,
    _engine: OpenAiEngine,
}

impl Deref for GatewayToEngine {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.gateway
    }
}

/// Starts a gateway in front of an engine that reasons and then calls the function `weather`.
pub(super) async fn tool_calling_server() -> GatewayToEngine {
    let call = json!([{"index": 0, "id": "call_a", "type": "function",
        "function": {"name": "weather", "arguments": ""}}]);
    let arguments =
        |text: &str| json!({"tool_calls": [{"index": 0, "function": {"arguments": text}}]});
    let events = vec![
        chat_event(&json!({"role": "assistant", "content": ""}), None),
        chat_event(&json!({"reasoning": "One "}), None),
        chat_event(&json!({"reasoning": "city."}), None),
        chat_event(&json!({"tool_calls": call}), None),
        chat_event(&arguments("{\"city\": "), None),
        chat_event(&arguments("\"Paris\"}"), Some("tool_calls")),
    ];
    let usage = json!({
        "prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29,
        "completion_tokens_details": {"reasoning_tokens": 4},
    });
    let engine = OpenAiEngine::answering(whole_with_usage(events, &usage)).await;
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    GatewayToEngine {
        gateway,
        _engine: engine,
    }
}

/// Asserts that the case's stream was counted as one cancellation, and that nothing is still running.
pub(super) async fn assert_cancelled(server: TestServer) {
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
}

/// Asserts that the client sent the failing request only once.
pub(super) async fn assert_failed_once(server: TestServer) {
    let counts = server.drain().await;
    assert_eq!(
        counts.ended_requests("http", "internal_error"),
        1.0,
        "{}",
        counts.0
    );
}
