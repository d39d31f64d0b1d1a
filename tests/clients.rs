//! What clients that nobody here wrote make of both doors: OpenAI's libraries for Python and for Node,
//! LangChain, LiteLLM, a plain HTTP client, a browser's `fetch`, and gRPC's libraries for Python and for
//! Node. Their side of each test is in `tests/clients/`, and has the test's name. `tests/curl.rs` has
//! curl's.

mod support;

use std::ops::Deref;
use std::time::Duration;

use rustix::process::Signal;
use support::program::{Program, Running, node, python, serving};
use support::{Setup, TestServer, every, full_speed, grpc, silent_at};
use tokenway::listen::Address;
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tonic::Streaming;

/// A client: how a file of `tests/clients/` is run, and which door it is for.
struct Client {
    program: fn() -> Program,
    door: Door,
}

enum Door {
    Http,
    Grpc,
}

const OPENAI: Client = Client {
    program: || python("tests/clients/openai_sdk.py"),
    door: Door::Http,
};

const OPENAI_NODE: Client = Client {
    program: || node("tests/clients/openai_sdk.mjs"),
    door: Door::Http,
};

const OPENAI_CHAT: Client = Client {
    program: || python("tests/clients/openai_chat.py"),
    door: Door::Http,
};

const OPENAI_NODE_CHAT: Client = Client {
    program: || node("tests/clients/openai_chat.mjs"),
    door: Door::Http,
};

const LANGCHAIN: Client = Client {
    program: || python("tests/clients/langchain_client.py"),
    door: Door::Http,
};

const LITELLM: Client = Client {
    program: || python("tests/clients/litellm_client.py"),
    door: Door::Http,
};

const PLAIN_HTTP: Client = Client {
    program: || python("tests/clients/plain_http.py"),
    door: Door::Http,
};

const REFERENCE_PERFORMANCE: Client = Client {
    program: || {
        let client = python("tests/clients/reference_performance.py");
        client.env("TEST_RUNNER_FREQUENCY_MS", "1")
    },
    door: Door::Http,
};

const BROWSER_FETCH: Client = Client {
    program: || node("tests/clients/browser_fetch.mjs"),
    door: Door::Http,
};

const GRPCIO: Client = Client {
    program: || python("tests/clients/grpcio_client.py"),
    door: Door::Grpc,
};

const GRPC_JS: Client = Client {
    program: || node("tests/clients/grpc_js.mjs"),
    door: Door::Grpc,
};

impl Client {
    /// Runs a case against a server. It has passed when this returns.
    async fn run(&self, case: &str, server: &TestServer) {
        let program = (self.program)().arg(case).arg(self.address(server));
        program.run().await.success();
    }

    fn address(&self, server: &TestServer) -> String {
        match self.door {
            Door::Http => server.http_url(),
            Door::Grpc => server.grpc_address(),
        }
    }

    /// Runs a case against a server that is sent a signal once the case says that it is reading a
    /// stream.
    async fn run_until_signal(&self, case: &str, signal: Signal) {
        let (server, [http, grpc]) = server_process().await;
        let address = match self.door {
            Door::Http => http,
            Door::Grpc => grpc.replace("http://", ""),
        };
        let mut client = (self.program)().arg(case).arg(address).start();
        assert_eq!(client.line().await, "reading");
        server.signal(signal);
        assert_eq!(client.end().await, Some(0));
    }
}

/// Tests that each run the case of their name, against a server of their own.
macro_rules! cases {
    ($client:ident: $($case:ident($server:expr);)*) => {$(
        #[tokio::test]
        async fn $case() {
            let server = $server.await;
            $client.run(stringify!($case), &server).await;
        }
    )*};
}

/// One test of all these cases, each against a server of its own, in one process: merely to import such
/// a client takes seconds of a processor's time.
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

/// A server in a process of its own, which can be killed.
async fn server_process() -> (Running, [String; 2]) {
    serving(&["--test-runner-frequency-ms", "1", "--drain-grace", "0"]).await
}

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

/// A server whose every stream fails in the place of token 10.
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
    server.failed().await;
    server
}

/// A server with one slot, and a token each millisecond.
async fn server_with_one_slot() -> TestServer {
    let runner = every(Duration::from_millis(1));
    Setup::test_runner(runner).slots(1).start().await
}

/// A server whose only slot is taken.
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

/// A server on which a request has to wait for longer than the test.
async fn busy_server() -> Busy {
    let setup = Setup::test_runner(silent_at(1)).slots(1).queue_depth(2);
    let server = setup.start().await;
    let mut running = server.stream(grpc::request("a", 100)).await;
    let started = running.message().await.expect("it runs");
    assert!(started.is_some());
    Busy {
        server,
        streams: vec![running],
    }
}

/// A server that takes nothing more.
async fn full_server() -> Busy {
    let mut busy = busy_server().await;
    for _ in 0..2 {
        let queued = busy.server.stream(grpc::request("a", 100)).await;
        busy.streams.push(queued);
    }
    busy
}

/// After a case that gave up its stream: nothing of it is left, and it counts as cancelled.
async fn assert_cancelled(server: TestServer) {
    let counts = server.drain().await;
    counts.assert_nothing_is_left();
    assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
}

/// After a case whose request failed: it was tried once.
async fn assert_failed_once(server: TestServer) {
    let counts = server.drain().await;
    let failed = "tokenway_requests_total{api=\"http\",outcome=\"internal_error\"}";
    assert_eq!(counts.get(failed), 1.0, "{}", counts.0);
}

mod openai {
    use super::*;

    cases! { OPENAI:
        a_stream_has_every_token_in_order_and_the_usage_last(server());
        an_async_stream_has_every_token_in_order(server());
        async_streams_at_once_have_every_token_in_order(server());
        without_a_stream_the_text_is_whole_and_the_usage_with_it(server());
        several_prompts_and_choices_are_told_apart_by_their_index(server());
        a_stop_string_ends_the_text_before_it(server());
        models_are_listed_and_described(server());
        a_refusal_is_a_bad_request_with_its_param_and_code(server());
        what_does_not_exist_is_not_found(server());
        a_request_that_is_too_large_is_refused(server());
        a_stream_in_no_form_that_is_accepted_is_refused(server());
        a_full_queue_is_a_rate_limit_that_says_when_to_retry(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_passes_in_the_queue_is_an_error(busy_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
        an_async_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn without_a_stream_a_failure_raises_and_is_not_tried_again() {
        let server = failing_server().await;
        let case = "without_a_stream_a_failure_raises_and_is_not_tried_again";
        OPENAI.run(case, &server).await;
        assert_failed_once(server).await;
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        OPENAI.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn a_stream_that_is_closed_early_leaves_the_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_stream_that_is_closed_early_leaves_the_slot_to_the_next";
        OPENAI.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod openai_node {
    use super::*;

    cases! { OPENAI_NODE:
        a_stream_has_every_token_in_order_and_the_usage_last(server());
        without_a_stream_the_text_is_whole_and_the_usage_with_it(server());
        several_prompts_and_choices_are_told_apart_by_their_index(server());
        models_are_listed_and_described(server());
        a_refusal_is_a_bad_request_with_its_param_and_code(server());
        an_unknown_model_is_not_found(server());
        a_request_that_is_too_large_is_refused(server());
        a_stream_in_no_form_that_is_accepted_is_refused(server());
        a_full_queue_is_a_rate_limit_that_says_when_to_retry(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_passes_in_the_queue_is_an_error(busy_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn without_a_stream_a_failure_raises_and_is_not_tried_again() {
        let server = failing_server().await;
        let case = "without_a_stream_a_failure_raises_and_is_not_tried_again";
        OPENAI_NODE.run(case, &server).await;
        assert_failed_once(server).await;
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        OPENAI_NODE.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn a_stream_that_is_closed_early_leaves_the_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_stream_that_is_closed_early_leaves_the_slot_to_the_next";
        OPENAI_NODE.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod openai_chat {
    use super::*;

    cases! { OPENAI_CHAT:
        a_stream_is_a_role_every_token_in_order_and_the_usage_last(server());
        an_async_stream_has_every_token_in_order(server());
        without_a_stream_the_message_is_whole_and_the_usage_with_it(server());
        several_choices_are_told_apart_by_their_index(server());
        a_refusal_is_a_bad_request_with_its_param_and_code(server());
        an_unknown_model_is_not_found(server());
        a_full_queue_is_a_rate_limit_that_says_when_to_retry(full_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        OPENAI_CHAT.run_until_signal(case, Signal::KILL).await;
    }
}

mod openai_node_chat {
    use super::*;

    cases! { OPENAI_NODE_CHAT:
        a_stream_is_a_role_every_token_in_order_and_the_usage_last(server());
        a_reader_that_collects_a_stream_gives_the_whole_message(server());
        without_a_stream_the_message_is_whole_and_the_usage_with_it(server());
        a_refusal_is_a_bad_request_with_its_param_and_code(server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        OPENAI_NODE_CHAT.run_until_signal(case, Signal::KILL).await;
    }
}

mod langchain {
    use super::*;

    cases_of_a_heavy_client! { LANGCHAIN:
        a_completion_is_whole(server());
        a_stream_has_every_token_in_order(server());
        an_async_stream_has_every_token_in_order(server());
        several_prompts_and_choices_are_told_apart(server());
        every_refusal_is_the_error_of_its_kind(server());
        a_full_queue_is_a_rate_limit_that_says_when_to_retry(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_passes_in_the_queue_is_an_error(busy_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
        a_completion_that_fails_raises(failing_server());
        a_chat_is_whole_and_its_usage_with_it(server());
        a_chat_stream_has_every_token_in_order(server());
        an_async_chat_stream_has_every_token_in_order(server());
        a_chat_that_asks_for_tools_is_refused(server());
        a_chat_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        LANGCHAIN.run_until_signal(case, Signal::KILL).await;
    }
}

mod litellm {
    use super::*;

    cases_of_a_heavy_client! { LITELLM:
        a_completion_is_whole_and_its_usage_with_it(server());
        a_stream_has_every_token_in_order(server());
        an_async_stream_has_every_token_in_order(server());
        several_choices_are_told_apart_by_their_index(server());
        every_refusal_is_the_error_of_its_kind(server());
        a_full_queue_is_a_rate_limit_that_says_when_to_retry(full_server());
        a_model_that_is_not_ready_is_unavailable(unready_server());
        a_deadline_that_passes_in_the_queue_is_an_error(busy_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
        a_completion_that_fails_raises(failing_server());
        a_chat_is_whole_and_its_usage_with_it(server());
        a_chat_stream_has_every_token_in_order(server());
        an_async_chat_stream_has_every_token_in_order(server());
        a_chat_that_asks_for_tools_is_refused(server());
        a_chat_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        LITELLM.run_until_signal(case, Signal::KILL).await;
    }
}

mod plain_http {
    use super::*;

    cases! { PLAIN_HTTP:
        a_client_that_accepts_anything_gets_a_line_for_each_token(server());
        a_stream_that_fails_has_an_error_record_and_then_raises(failing_server());
    }
}

mod reference_performance {
    use super::*;

    /// The alias is a setting's default, so the server is the program itself.
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
        a_stream_is_a_line_for_each_token(server());
        a_stream_of_events_is_an_event_for_each_token_and_its_end(server());
        without_a_stream_the_answer_is_one_object(server());
        every_refusal_has_its_status_and_an_object_that_says_why(server());
        a_full_queue_says_when_to_retry(full_server());
        a_stream_that_fails_has_an_error_record_and_then_raises(failing_server());
        a_stream_of_events_that_fails_has_an_error_record_and_then_raises(failing_server());
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        BROWSER_FETCH.run_until_signal(case, Signal::KILL).await;
    }

    #[tokio::test]
    async fn an_aborted_stream_leaves_its_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "an_aborted_stream_leaves_its_slot_to_the_next";
        BROWSER_FETCH.run(case, &server).await;
        assert_cancelled(server).await;
    }
}

mod grpcio {
    use super::*;

    cases! { GRPCIO:
        reflection_lists_the_services(server());
        health_says_serving(server());
        health_says_not_serving(unready_server());
        a_stream_is_a_start_every_token_in_order_and_a_summary(server());
        a_refusal_names_its_reason_and_its_field(server());
        a_full_queue_says_when_to_retry(full_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_unix_socket_serves_a_channel_whose_authority_is_a_host() {
        let folder = tempfile::tempdir().unwrap();
        let mut setup = Setup::test_runner(full_speed());
        setup.parts.grpc = Some(Address::Unix(folder.path().join("grpc.sock")));
        let server = setup.start().await;
        let case = "a_unix_socket_serves_a_channel_whose_authority_is_a_host";
        GRPCIO.run(case, &server).await;
    }

    #[tokio::test]
    async fn a_watched_health_says_not_serving_when_the_server_drains() {
        let case = "a_watched_health_says_not_serving_when_the_server_drains";
        GRPCIO.run_until_signal(case, Signal::INT).await;
    }

    #[tokio::test]
    async fn a_cancelled_stream_leaves_its_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_cancelled_stream_leaves_its_slot_to_the_next";
        GRPCIO.run(case, &server).await;
        assert_cancelled(server).await;
    }

    #[tokio::test]
    async fn a_deadline_that_passes_ends_the_stream_and_frees_its_slot() {
        let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
        let case = "a_deadline_that_passes_ends_the_stream_and_frees_its_slot";
        GRPCIO.run(case, &server).await;
        server.drain().await.assert_nothing_is_left();
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        GRPCIO.run_until_signal(case, Signal::KILL).await;
    }
}

mod grpc_js {
    use super::*;

    cases! { GRPC_JS:
        reflection_lists_the_services(server());
        health_says_serving(server());
        a_stream_is_a_start_every_token_in_order_and_a_summary(server());
        several_choices_are_told_apart_by_their_index(server());
        a_refusal_names_its_reason_and_its_field(server());
        a_full_queue_says_when_to_retry(full_server());
        a_stream_that_fails_raises_after_the_tokens_before_it(failing_server());
    }

    #[tokio::test]
    async fn a_watched_health_says_not_serving_when_the_server_drains() {
        let case = "a_watched_health_says_not_serving_when_the_server_drains";
        GRPC_JS.run_until_signal(case, Signal::INT).await;
    }

    #[tokio::test]
    async fn a_cancelled_stream_leaves_its_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_cancelled_stream_leaves_its_slot_to_the_next";
        GRPC_JS.run(case, &server).await;
        assert_cancelled(server).await;
    }

    #[tokio::test]
    async fn a_deadline_that_passes_ends_the_stream_and_frees_its_slot() {
        let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
        let case = "a_deadline_that_passes_ends_the_stream_and_frees_its_slot";
        GRPC_JS.run(case, &server).await;
        server.drain().await.assert_nothing_is_left();
    }

    #[tokio::test]
    async fn a_stream_that_is_cut_raises() {
        let case = "a_stream_that_is_cut_raises";
        GRPC_JS.run_until_signal(case, Signal::KILL).await;
    }
}
