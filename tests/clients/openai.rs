//! Tests with OpenAI's library for Python.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{
    assert_cancelled, assert_failed_once, busy_server, failing_server, full_server, server,
    server_with_one_slot, unready_server,
};
use super::support::program::python;

const OPENAI: Client = Client {
    program: || python("tests/clients/openai_sdk.py"),
    api: Api::Http,
};

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
