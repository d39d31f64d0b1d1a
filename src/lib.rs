//! Tokenway streams the tokens of large language models over gRPC and over an OpenAI-compatible HTTP API.
//!
//! The modules are listed in the order in which a token passes through them. A module uses only modules below it,
//! `error` and `telemetry`. `docs/architecture.md` describes the whole path.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

pub mod config;

pub mod client;

pub mod server;

pub mod listen;

mod frontend;

pub mod gateway;

mod proxy;

pub mod cluster;

mod grpc;

mod token_charges;

pub mod context;

pub mod request_memory;

pub mod caller;

pub mod delivery;

pub mod text;

mod prompt;

pub mod scheduler;

pub mod worker;

pub mod models;

pub mod runner;

pub mod hub;

#[cfg_attr(
    not(any(test, feature = "fuzzing", feature = "llama-cpp")),
    expect(
        dead_code,
        reason = "only the name of a model is needed without llama.cpp"
    )
)]
mod gguf_name;

pub mod certificates;

mod poll_on_wake;

pub mod critical;

mod backoff;

pub mod prefix_index;

mod sequence_proto;

pub mod proto;

pub mod tokens;

pub mod request;

pub mod error;

pub mod telemetry;

pub mod keys;

mod watched_files;

pub mod allocator;

pub mod logging;

pub mod output;

pub mod exit;
