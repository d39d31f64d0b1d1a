//! Tests with gRPC's library for Node.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{assert_cancelled, failing_server, full_server, server, server_with_one_slot};
use super::support::program::node;
use super::support::{Setup, silent_at};

const GRPC_JS: Client = Client {
    program: || node("tests/clients/grpc_js.mjs"),
    api: Api::Grpc,
};

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
