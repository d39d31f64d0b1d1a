//! What clients that nobody here wrote make of both doors: OpenAI's library, a plain HTTP client and
//! grpcio, all in Python. Their side of each test is in `tests/clients/`, and has the test's name.

mod support;

use std::time::Duration;

use support::program::python;
use support::{Setup, TestServer, every, full_speed, grpc, silent_at};
use tokenway::proto::v1;
use tokenway::runner::llm_test::TestRunnerOptions;
use tonic::Streaming;

/// A file of `tests/clients/`, its cases, and how its client is told of a server.
struct Client {
    script: &'static str,
    address: fn(&TestServer) -> String,
}

const OPENAI: Client = Client {
    script: "tests/clients/openai_sdk.py",
    address: TestServer::http_url,
};

const PLAIN_HTTP: Client = Client {
    script: "tests/clients/plain_http.py",
    address: TestServer::http_url,
};

const GRPCIO: Client = Client {
    script: "tests/clients/grpcio_client.py",
    address: TestServer::grpc_address,
};

impl Client {
    /// Runs a case against a server. It has passed when this returns.
    async fn run(&self, case: &str, server: &TestServer) {
        let program = python(self.script).arg(case).arg((self.address)(server));
        program.run().await.success();
    }
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

/// A server with one slot, and a token each millisecond.
async fn server_with_one_slot() -> TestServer {
    let runner = every(Duration::from_millis(1));
    Setup::test_runner(runner).slots(1).start().await
}

/// A server that takes nothing more, and the streams that are all it has room for.
async fn full_server() -> (TestServer, [Streaming<v1::CompletionEvent>; 2]) {
    let setup = Setup::test_runner(silent_at(1)).slots(1).queue_depth(1);
    let server = setup.start().await;
    let mut client = server.grpc().await;
    let mut open = async || {
        let response = client.complete(grpc::request("a", 100)).await;
        response.expect("it is admitted").into_inner()
    };
    let mut running = open().await;
    let started = running.message().await.expect("it runs");
    assert!(started.is_some());
    let queued = open().await;
    (server, [running, queued])
}

mod openai {
    use super::*;

    #[tokio::test]
    async fn a_stream_has_every_token_in_order_and_the_usage_last() {
        let case = "a_stream_has_every_token_in_order_and_the_usage_last";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn an_async_stream_has_every_token_in_order() {
        let case = "an_async_stream_has_every_token_in_order";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn async_streams_at_once_have_every_token_in_order() {
        let case = "async_streams_at_once_have_every_token_in_order";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn without_a_stream_the_text_is_whole_and_the_usage_with_it() {
        let case = "without_a_stream_the_text_is_whole_and_the_usage_with_it";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn several_prompts_and_choices_are_told_apart_by_their_index() {
        let case = "several_prompts_and_choices_are_told_apart_by_their_index";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_stop_string_ends_the_text_before_it() {
        let case = "a_stop_string_ends_the_text_before_it";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn models_are_listed_and_described() {
        let case = "models_are_listed_and_described";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_refusal_is_a_bad_request_with_its_param_and_code() {
        let case = "a_refusal_is_a_bad_request_with_its_param_and_code";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn what_does_not_exist_is_not_found() {
        let case = "what_does_not_exist_is_not_found";
        OPENAI.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_full_queue_is_a_rate_limit_that_says_when_to_retry() {
        let (server, streams) = full_server().await;
        let case = "a_full_queue_is_a_rate_limit_that_says_when_to_retry";
        OPENAI.run(case, &server).await;
        drop(streams);
    }

    #[tokio::test]
    async fn a_stream_that_fails_raises_after_the_tokens_before_it() {
        let case = "a_stream_that_fails_raises_after_the_tokens_before_it";
        OPENAI.run(case, &failing_server().await).await;
    }

    #[tokio::test]
    async fn an_async_stream_that_fails_raises_after_the_tokens_before_it() {
        let case = "an_async_stream_that_fails_raises_after_the_tokens_before_it";
        OPENAI.run(case, &failing_server().await).await;
    }

    #[tokio::test]
    async fn without_a_stream_a_failure_raises_and_is_not_tried_again() {
        let server = failing_server().await;
        let case = "without_a_stream_a_failure_raises_and_is_not_tried_again";
        OPENAI.run(case, &server).await;
        let counts = server.drain().await;
        let failed = "tokenway_requests_total{door=\"http\",outcome=\"internal_error\"}";
        assert_eq!(counts.get(failed), 1.0, "{}", counts.0);
    }

    #[tokio::test]
    async fn a_stream_that_is_closed_early_leaves_the_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_stream_that_is_closed_early_leaves_the_slot_to_the_next";
        OPENAI.run(case, &server).await;
        let counts = server.drain().await;
        counts.assert_nothing_is_left();
        assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
    }
}

mod plain_http {
    use super::*;

    #[tokio::test]
    async fn a_client_that_accepts_anything_gets_a_line_for_each_token() {
        let case = "a_client_that_accepts_anything_gets_a_line_for_each_token";
        PLAIN_HTTP.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_stream_that_fails_has_an_error_record_and_then_raises() {
        let case = "a_stream_that_fails_has_an_error_record_and_then_raises";
        PLAIN_HTTP.run(case, &failing_server().await).await;
    }
}

mod grpcio {
    use super::*;

    #[tokio::test]
    async fn reflection_lists_the_services() {
        let case = "reflection_lists_the_services";
        GRPCIO.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn health_says_serving() {
        GRPCIO.run("health_says_serving", &server().await).await;
    }

    #[tokio::test]
    async fn health_says_not_serving() {
        let server = Setup::unloadable().start_loading().await;
        server.failed().await;
        GRPCIO.run("health_says_not_serving", &server).await;
    }

    #[tokio::test]
    async fn a_stream_is_a_start_every_token_in_order_and_a_summary() {
        let case = "a_stream_is_a_start_every_token_in_order_and_a_summary";
        GRPCIO.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_cancelled_stream_leaves_its_slot_to_the_next() {
        let server = server_with_one_slot().await;
        let case = "a_cancelled_stream_leaves_its_slot_to_the_next";
        GRPCIO.run(case, &server).await;
        let counts = server.drain().await;
        counts.assert_nothing_is_left();
        assert_eq!(counts.get("tokenway_cancellations_total"), 1.0);
    }

    #[tokio::test]
    async fn a_deadline_that_passes_ends_the_stream_and_frees_its_slot() {
        let server = Setup::test_runner(silent_at(3)).slots(1).start().await;
        let case = "a_deadline_that_passes_ends_the_stream_and_frees_its_slot";
        GRPCIO.run(case, &server).await;
        server.drain().await.assert_nothing_is_left();
    }

    #[tokio::test]
    async fn a_refusal_names_its_reason_and_its_field() {
        let case = "a_refusal_names_its_reason_and_its_field";
        GRPCIO.run(case, &server().await).await;
    }

    #[tokio::test]
    async fn a_full_queue_says_when_to_retry() {
        let (server, streams) = full_server().await;
        GRPCIO.run("a_full_queue_says_when_to_retry", &server).await;
        drop(streams);
    }

    #[tokio::test]
    async fn a_stream_that_fails_raises_after_the_tokens_before_it() {
        let case = "a_stream_that_fails_raises_after_the_tokens_before_it";
        GRPCIO.run(case, &failing_server().await).await;
    }
}
