//! Third-party clients of both APIs: OpenAI's libraries for Python and Node, LangChain, LiteLLM, a plain HTTP client,
//! `fetch`, and gRPC's libraries for Python and Node.
//!
//! The client's side of each test is a function with the same name as the test, in the script that the file's
//! `Client` names. The tests with curl are in `tests/curl.rs`.

#[path = "../support/mod.rs"]
mod support;

/// Defines one test per case. Each runs against its own server.
macro_rules! cases {
    ($client:ident: $($case:ident($server:expr);)*) => {$(
        #[tokio::test]
        async fn $case() {
            let server = $server.await;
            $client.run(stringify!($case), &server).await;
        }
    )*};
}

/// Defines one test that runs all cases in a single client process, each case against its own server. It is for
/// clients whose import takes seconds of CPU time.
macro_rules! cases_of_a_heavy_client {
    ($client:ident: $($case:ident($server:expr);)*) => {
        #[tokio::test]
        async fn every_case_passes() {
            let program = ($client.program)();
            $(
                let server = $server.await;
                let program = program.arg(stringify!($case)).arg($client.address(&server));
            )*
            program.run().await.expect_success();
        }
    };
}

mod client;
mod servers;

mod browser_fetch;
mod grpc_js;
mod grpcio;
mod langchain;
mod litellm;
mod openai;
mod openai_chat;
mod openai_node;
mod openai_node_chat;
mod plain_http;
mod reference_performance;
mod secured;
