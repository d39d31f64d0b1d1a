//! Tokenway streams the tokens of large language models through two doors: gRPC, and OpenAI's HTTP.
//!
//! The modules stand in the order of a token's path, and each names only modules below it (besides
//! `error` and `telemetry`). `docs/architecture.md` walks the path once.

pub mod config;

pub mod client;

pub mod server;

pub mod listen;

pub mod gateway;

pub mod cluster;

pub mod grpc;

pub mod delivery;

pub mod text;

pub mod scheduler;

pub mod worker;

pub mod runner;

pub mod tokens;

pub mod poll_on_wake;

pub mod critical;

pub mod request;

pub mod error;

pub mod telemetry;

pub mod output;

pub mod exit;

pub mod proto;
