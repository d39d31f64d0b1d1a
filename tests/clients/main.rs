//! Third-party clients of both APIs: OpenAI's libraries for Python and Node, LangChain, LiteLLM, a plain HTTP client,
//! `fetch`, and gRPC's libraries for Python and Node.
//!
//! The client side of each test is a function of the same name in the script that the file's `Client` names. curl is
//! in `tests/curl.rs`.

#[path = "../support/mod.rs"]
mod support;

/// One test per case, each against its own server.
macro_rules! cases {
    ($client:ident: $($case:ident($server:expr);)*) => {$(
        #[tokio::test]
        async fn $case() {
            let server = $server.await;
            $client.run(stringify!($case), &server).await;
        }
    )*};
}

/// One test that runs all cases in one client process, each against its own server: importing such a client takes
/// seconds of CPU time.
macro_rules! cases_of_a_heavy_client {
    ($client:ident: $($case:ident($server:expr);)*) => {
        #[tokio::test]
        async fn every_case_passes() {
            let program = ($client.program)();
            $(
                let server = $server.await;
                let program = program.arg(stringify!($case)).arg($client.address(&server));
            )*
            program.run().await.success();
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
