//! Tests with the reference system's performance test.

use super::client::{Api, Client};
use super::servers::server_process;
use super::support::program::python;

const REFERENCE_PERFORMANCE: Client = Client {
    program: || {
        let client = python("tests/clients/reference_performance.py");
        client.env("TEST_RUNNER_FREQUENCY_MS", "1")
    },
    api: Api::Http,
};

/// The server is a process here, because only the command line adds the alias `test` by default.
#[tokio::test]
async fn the_model_test_streams_2048_tokens_at_the_runners_cadence() {
    let (_server, [http, _]) = server_process().await;
    let case = "the_model_test_streams_2048_tokens_at_the_runners_cadence";
    let client = (REFERENCE_PERFORMANCE.program)().arg(case).arg(http);
    client.run().await.expect_success();
}
