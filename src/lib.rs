//! Tokenway streams the tokens of large language models through two doors: gRPC, and OpenAI's HTTP.
//!
//! The modules stand in the order of a token's path, and each names only modules below it (besides
//! `error` and `telemetry`). `docs/architecture.md` walks the path once.

pub mod cluster;
pub mod error;
pub mod gateway;
pub mod grpc;
pub mod listen;
pub mod proto;
pub mod request;
pub mod runner;
pub mod scheduler;
pub mod server;
pub mod telemetry;
pub mod text;
pub mod worker;
