//! Tests with LangChain.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{busy_server, failing_server, full_server, server, unready_server};
use super::support::program::python;

const LANGCHAIN: Client = Client {
    program: || python("tests/clients/langchain_client.py"),
    api: Api::Http,
};

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
