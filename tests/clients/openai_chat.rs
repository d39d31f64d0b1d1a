//! Tests of chat completions with OpenAI's library for Python.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{failing_server, full_server, server, tool_calling_server};
use super::support::program::python;

const OPENAI_CHAT: Client = Client {
    program: || python("tests/clients/openai_chat.py"),
    api: Api::Http,
};

cases! { OPENAI_CHAT:
    a_stream_has_the_role_then_every_token_then_the_usage(server());
    an_async_stream_has_every_token_in_order(server());
    a_unary_completion_has_the_whole_message_and_its_usage(server());
    choices_are_identified_by_index(server());
    the_stream_helper_joins_a_tool_call(tool_calling_server());
    a_stream_has_the_reasoning_before_the_tool_call(tool_calling_server());
    a_unary_completion_has_the_tool_call(tool_calling_server());
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
