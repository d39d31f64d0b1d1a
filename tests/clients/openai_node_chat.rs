//! Tests of chat completions with OpenAI's library for Node.

use rustix::process::Signal;

use super::client::{Api, Client};
use super::servers::{failing_server, server, tool_calling_server};
use super::support::program::node;

const OPENAI_NODE_CHAT: Client = Client {
    program: || node("tests/clients/openai_chat.mjs"),
    api: Api::Http,
};

cases! { OPENAI_NODE_CHAT:
    a_stream_has_the_role_then_every_token_then_the_usage(server());
    the_stream_helper_collects_the_whole_message(server());
    the_stream_helper_joins_a_tool_call(tool_calling_server());
    a_unary_completion_has_the_whole_message_and_its_usage(server());
    a_rejected_request_raises_bad_request_with_param_and_code(server());
    a_failing_stream_raises_after_its_last_token(failing_server());
}

#[tokio::test]
async fn a_truncated_stream_raises() {
    let case = "a_truncated_stream_raises";
    OPENAI_NODE_CHAT.run_until_signal(case, Signal::KILL).await;
}
