//! Tests with Node's `fetch`, which has the same interface as the `fetch` of browsers.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{assert_cancelled, failing_server, full_server, server, server_with_one_slot};
use super::support::program::node;

const BROWSER_FETCH: Client = Client {
    program: || node("tests/clients/browser_fetch.mjs"),
    api: Api::Http,
};

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
