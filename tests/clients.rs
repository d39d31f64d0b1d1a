//! Third-party clients of both APIs: OpenAI's libraries for Python and Node, LangChain, LiteLLM, a plain HTTP client,
//! `fetch`, and gRPC's libraries for Python and Node.
//!
//! The client side of each test is a function of the same name in `tests/clients/`. curl is in `tests/curl.rs`.

mod support;

use std::ops::Deref;
use std::time::Duration;

use rustix::process::Signal;
use support::program::{Program, Running, node, python, serving};
use support::{Setup, TestServer, full_speed, grpc, silent_at, with_interval};
use tokenway::listen::Address;
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tonic::Streaming;

/// A client program in `tests/clients/` and the API that it uses.
struct Client {
    program: fn() -> Program,
    api: Api,
}

enum Api {
    Http,
    Grpc,
}

const OPENAI: Client = Client {
    program: || python("tests/clients/openai_sdk.py"),
    api: Api::Http,
};

const OPENAI_NODE: Client = Client {
    program: || node("tests/clients/openai_sdk.mjs"),
    api: Api::Http,
};

const OPENAI_CHAT: Client = Client {
    program: || python("tests/clients/openai_chat.py"),
    api: Api::Http,
};

const OPENAI_NODE_CHAT: Client = Client {
    program: || node("tests/clients/openai_chat.mjs"),
    api: Api::Http,
};

const LANGCHAIN: Client = Client {
    program: || python("tests/clients/langchain_client.py"),
    api: Api::Http,
};

const LITELLM: Client = Client {
    program: || python("tests/clients/litellm_client.py"),
    api: Api::Http,
};

const PLAIN_HTTP: Client = Client {
    program: || python("tests/clients/plain_http.py"),
    api: Api::Http,
};

const REFERENCE_PERFORMANCE: Client = Client {
    program: || {
        let client = python("tests/clients/reference_performance.py");
        client.env("TEST_RUNNER_FREQUENCY_MS", "1")
    },
    api: Api::Http,
};

const BROWSER_FETCH: Client = Client {
    program: || node("tests/clients/browser_fetch.mjs"),
    api: Api::Http,
};

const GRPCIO: Client = Client {
    program: || python("tests/clients/grpcio_client.py"),
    api: Api::Grpc,
};

const GRPC_JS: Client = Client {
    program: || node("tests/clients/grpc_js.mjs"),
    api: Api::Grpc,
};

impl Client {
    /// Runs a case against a server and asserts that it passes.
    async fn run(&self, case: &str, server: &TestServer) {
        let program = (self.program)().arg(case).arg(self.address(server));
        program.run().await.success();
    }

    fn address(&self, server: &TestServer) -> String {
        match self.api {
            Api::Http => server.http_url(),
            Api::Grpc => server.grpc_address(),
        }
    }

    /// Runs a case against a server process, which gets the signal once the case prints that it is reading a stream.
    async fn run_until_signal(&self, case: &str, signal: Signal) {
        let (server, [http, grpc]) = server_process().await;
        let address = match self.api {
            Api::Http => http,
            Api::Grpc => grpc.replace("http://", ""),
        };
        let mut client = (self.program)().arg(case).arg(address).start();
        assert_eq!(client.line().await, "reading");
        server.signal(signal);
        assert_eq!(client.end().await, Some(0));
    }
}

/// One test per case, each against its own server.
macro_rules! cases {
    ($client:ident: $($case:ident($server:expr);)*) => {$(
        #[tokio::test]
        async fn $case() {
            let server = $server.await;
            $client.run(stringify!($case), &server).await;
        }
    )*};
}

/// One test that runs all cases in one client process, each against its own server: importing such a client takes
/// seconds of CPU time.
macro_rules! cases_of_a_heavy_client {
    ($client:ident: $($case:ident($server:expr);)*) => {
        #[tokio::test]
        async fn every_case_passes() {
            let program = ($client.program)();
            $(
                let server = $server.await;
                let program = program.arg(stringify!($case)).arg($client.address(&server));
            )*
            program.run().await.success();
        }
    };
}

/// A server in its own process, which can be killed.
async fn server_process() -> (Running, [String; 2]) {
    serving(&["--test-runner-frequency-ms", "1", "--drain-grace", "0"]).await
}

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// A server whose streams all fail instead of emitting token 10.
async fn failing_server() -> TestServer {
    let options = TestRunnerOptions {
        fail_at: Some(10),
        ..full_speed()
    };
    Setup::test_runner(options).start().await
}

/// A server whose model cannot be loaded.
async fn unready_server() -> TestServer {
    let server = Setup::unloadable().start_loading().await;
    server.wait_until_load_failed().await;
    server
}

/// A server with one slot and one token per millisecond.
async fn server_with_one_slot() -> TestServer {
    let runner = with_interval(Duration::from_millis(1));
    Setup::test_runner(runner).slots(1).start().await
}

/// A server whose only slot is occupied.
struct Busy {
    server: TestServer,
    streams: Vec<Streaming<v1::CompletionEvent>>,
}

impl Deref for Busy {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}

/// A server on which a request waits longer than the test runs.
async fn busy_server() -> Busy {
    let setup = Setup::test_runner(silent_at(1)).slots(1).queue_depth(2);
    let server = setup.start().await;
    let mut running = server.stream(grpc::request("a", 100)).await;
    let started = running.message().await.expect("the stream continues");
    assert!(started.is_some());
    Busy {
        server,
        streams: vec![running],
    }
}

/// A server with a full queue.
async fn full_server() -> Busy {
    let mut busy = busy_server().await;
    for _ in 0..2 {
        let queued = busy.server.stream(grpc::request("a", 100)).await;
        busy.streams.push(queued);
    }
    busy
}

/// Asserts that the case's stream counts as one cancellation and has left nothing running.
async fn assert_cancelled(server: TestServer) {
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
}

/// Asserts that the case sent its failing request once.
async fn assert_failed_once(server: TestServer) {
    let counts = server.drain().await;
    assert_eq!(counts.ended("http", "internal_error"), 1.0, "{}", counts.0);
}

mod openai {
    use super::*;

    cases! { OPENAI:
        a_stream_has_every_token_in_order_and_the_usage_last(server());
        an_async_stream_has_every_token_in_order(server());
        concurrent_async_streams_have_every_token_in_order(server());
        a_unary_completion_has_the_whole_text_and_its_usage(server());
        prompts_and_choices_are_identified_by_index(server());
        a_stop_string_ends_the_text_and_is_left_out(server());
        models_are_listed_and_described(server());
        a_rejected_request_raises_bad_request_with_param_and_code(server());
        unknown_models_and_routes_are_not_found(server());
        an_oversized_request_is_rejected(server());
        an_unsupported_accept_header_is_rejected(server());
        a_full_queue_raises_rate_limit_with_retry_after(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_expires_in_the_queue_raises(busy_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
        an_async_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_unary_failure_raises_and_is_not_retried() {
        let server = failing_server().await;
        let case = "a_unary_failure_raises_and_is_not_retried";
        OPENAI.run(case, &server).await;
        assert_failed_once(server).await;
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        OPENAI.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn closing_a_stream_early_frees_the_slot() {
        let server = server_with_one_slot().await;
        let case = "closing_a_stream_early_frees_the_slot";
        OPENAI.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod openai_node {
    use super::*;

    cases! { OPENAI_NODE:
        a_stream_has_every_token_in_order_and_the_usage_last(server());
        a_unary_completion_has_the_whole_text_and_its_usage(server());
        prompts_and_choices_are_identified_by_index(server());
        models_are_listed_and_described(server());
        a_rejected_request_raises_bad_request_with_param_and_code(server());
        an_unknown_model_is_not_found(server());
        an_oversized_request_is_rejected(server());
        an_unsupported_accept_header_is_rejected(server());
        a_full_queue_raises_rate_limit_with_retry_after(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_expires_in_the_queue_raises(busy_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_unary_failure_raises_and_is_not_retried() {
        let server = failing_server().await;
        let case = "a_unary_failure_raises_and_is_not_retried";
        OPENAI_NODE.run(case, &server).await;
        assert_failed_once(server).await;
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        OPENAI_NODE.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn closing_a_stream_early_frees_the_slot() {
        let server = server_with_one_slot().await;
        let case = "closing_a_stream_early_frees_the_slot";
        OPENAI_NODE.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod openai_chat {
    use super::*;

    cases! { OPENAI_CHAT:
        a_stream_has_the_role_then_every_token_then_the_usage(server());
        an_async_stream_has_every_token_in_order(server());
        a_unary_completion_has_the_whole_message_and_its_usage(server());
        choices_are_identified_by_index(server());
        a_rejected_request_raises_bad_request_with_param_and_code(server());
        an_unknown_model_is_not_found(server());
        a_full_queue_raises_rate_limit_with_retry_after(full_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        OPENAI_CHAT.run_until_signal(case, Signal::KILL).await;
    }
}

mod openai_node_chat {
    use super::*;

    cases! { OPENAI_NODE_CHAT:
        a_stream_has_the_role_then_every_token_then_the_usage(server());
        the_stream_helper_collects_the_whole_message(server());
        a_unary_completion_has_the_whole_message_and_its_usage(server());
        a_rejected_request_raises_bad_request_with_param_and_code(server());
        a_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        OPENAI_NODE_CHAT.run_until_signal(case, Signal::KILL).await;
    }
}

mod langchain {
    use super::*;

    cases_of_a_heavy_client! { LANGCHAIN:
        a_completion_has_the_whole_text(server());
        a_stream_has_every_token_in_order(server());
        an_async_stream_has_every_token_in_order(server());
        prompts_and_choices_are_kept_apart(server());
        each_rejection_raises_the_matching_exception(server());
        a_full_queue_raises_rate_limit_with_retry_after(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_expires_in_the_queue_raises(busy_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
        a_failing_completion_raises(failing_server());
        a_chat_completion_has_the_whole_text_and_its_usage(server());
        a_chat_stream_has_every_token_in_order(server());
        an_async_chat_stream_has_every_token_in_order(server());
        a_chat_with_tools_is_rejected(server());
        a_failing_chat_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        LANGCHAIN.run_until_signal(case, Signal::KILL).await;
    }
}

mod litellm {
    use super::*;

    cases_of_a_heavy_client! { LITELLM:
        a_completion_has_the_whole_text_and_its_usage(server());
        a_stream_has_every_token_in_order(server());
        an_async_stream_has_every_token_in_order(server());
        choices_are_identified_by_index(server());
        each_rejection_raises_the_matching_exception(server());
        a_full_queue_raises_rate_limit_with_retry_after(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_expires_in_the_queue_raises(busy_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
        a_failing_completion_raises(failing_server());
        a_chat_completion_has_the_whole_text_and_its_usage(server());
        a_chat_stream_has_every_token_in_order(server());
        an_async_chat_stream_has_every_token_in_order(server());
        a_chat_with_tools_is_rejected(server());
        a_failing_chat_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        LITELLM.run_until_signal(case, Signal::KILL).await;
    }
}

mod plain_http {
    use super::*;

    cases! { PLAIN_HTTP:
        a_client_that_accepts_anything_gets_one_line_per_token(server());
        a_failing_stream_has_an_error_record_and_then_raises(failing_server());
    }
}

mod reference_performance {
    use super::*;

    /// The alias `test` is a default of the command line, so this needs the server program.
    #[tokio::test]
    async fn the_model_test_streams_2048_tokens_at_the_runners_cadence() {
        let (_server, [http, _]) = server_process().await;
        let case = "the_model_test_streams_2048_tokens_at_the_runners_cadence";
        let client = (REFERENCE_PERFORMANCE.program)().arg(case).arg(http);
        client.run().await.success();
    }
}

mod browser_fetch {
    use super::*;

    cases! { BROWSER_FETCH:
        a_stream_has_one_line_per_token(server());
        an_sse_stream_has_one_event_per_token_and_done(server());
        a_unary_response_is_one_object(server());
        each_rejection_has_a_status_and_an_error_object(server());
        a_full_queue_says_when_to_retry(full_server());
        a_failing_stream_has_an_error_record_and_then_raises(failing_server());
        a_failing_sse_stream_has_an_error_record_and_then_raises(failing_server());
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        BROWSER_FETCH.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn aborting_a_stream_frees_its_slot() {
        let server = server_with_one_slot().await;
        let case = "aborting_a_stream_frees_its_slot";
        BROWSER_FETCH.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod grpcio {
    use super::*;

    cases! { GRPCIO:
        reflection_lists_the_services(server());
        health_reports_serving(server());
        health_reports_not_serving(unready_server());
        a_stream_has_a_start_every_token_and_a_summary(server());
        an_error_carries_its_reason_and_field(server());
        a_full_queue_says_when_to_retry(full_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn a_unix_socket_accepts_a_host_name_as_authority() {
        let folder = tempfile::tempdir().unwrap();
        let mut setup = Setup::test_runner(full_speed());
        setup.parts.grpc = Some(Address::Unix(folder.path().join("grpc.sock")));
        let server = setup.start().await;
        let case = "a_unix_socket_accepts_a_host_name_as_authority";
        GRPCIO.run(case, &server).await;
    }

    #[tokio::test]
    async fn health_watch_reports_not_serving_while_draining() {
        let case = "health_watch_reports_not_serving_while_draining";
        GRPCIO.run_until_signal(case, Signal::INT).await;
    }

    #[tokio::test]
    async fn cancelling_a_stream_frees_its_slot() {
        let server = server_with_one_slot().await;
        let case = "cancelling_a_stream_frees_its_slot";
        GRPCIO.run(case, &server).await;
        assert_cancelled(server).await;
    }

    #[tokio::test]
    async fn an_expired_deadline_ends_the_stream_and_frees_its_slot() {
        let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
        let case = "an_expired_deadline_ends_the_stream_and_frees_its_slot";
        GRPCIO.run(case, &server).await;
        server.drain().await.assert_all_gauges_are_zero();
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        GRPCIO.run_until_signal(case, Signal::KILL).await;
    }
}

mod grpc_js {
    use super::*;

    cases! { GRPC_JS:
        reflection_lists_the_services(server());
        health_reports_serving(server());
        a_stream_has_a_start_every_token_and_a_summary(server());
        choices_are_identified_by_index(server());
        an_error_carries_its_reason_and_field(server());
        a_full_queue_says_when_to_retry(full_server());
        a_failing_stream_raises_after_its_last_token(failing_server());
    }

    #[tokio::test]
    async fn health_watch_reports_not_serving_while_draining() {
        let case = "health_watch_reports_not_serving_while_draining";
        GRPC_JS.run_until_signal(case, Signal::INT).await;
    }

    #[tokio::test]
    async fn cancelling_a_stream_frees_its_slot() {
        let server = server_with_one_slot().await;
        let case = "cancelling_a_stream_frees_its_slot";
        GRPC_JS.run(case, &server).await;
        assert_cancelled(server).await;
    }

    #[tokio::test]
    async fn an_expired_deadline_ends_the_stream_and_frees_its_slot() {
        let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
        let case = "an_expired_deadline_ends_the_stream_and_frees_its_slot";
        GRPC_JS.run(case, &server).await;
        server.drain().await.assert_all_gauges_are_zero();
    }

    #[tokio::test]
    async fn a_truncated_stream_raises() {
        let case = "a_truncated_stream_raises";
        GRPC_JS.run_until_signal(case, Signal::KILL).await;
    }
}
