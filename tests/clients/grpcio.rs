//! Tests with gRPC's library for Python.

use rustix::process::Signal;
use tokenway::listen::Address;

use super::client::{Api, Client};
use super::servers::{
    assert_cancelled, failing_server, full_server, server, server_with_one_slot, unready_server,
};
use super::support::program::python;
use super::support::{Setup, full_speed, silent_at};

const GRPCIO: Client = Client {
    program: || python("tests/clients/grpcio_client.py"),
    api: Api::Grpc,
};

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
