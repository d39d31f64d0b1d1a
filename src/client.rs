//! `tokenway complete`: a client for the HTTP API and the gRPC API that streams a completion to the terminal. It uses
//! only the public API of a server.

use std::io::{self, Write};
use std::time::Duration;

use clap::{ArgAction, Args};

mod grpc;
mod http;

/// Maximum time to connect to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Options of `tokenway complete`: the request and the server.
#[derive(Args, Clone, Debug)]
pub struct ClientOptions {
    /// Prompt to complete
    prompt: String,
    /// Use the HTTP API (the default)
    #[arg(long, conflicts_with = "grpc", action = ArgAction::SetTrue)]
    http: bool,
    /// Use the gRPC API
    #[arg(long, action = ArgAction::SetTrue)]
    grpc: bool,
    /// Address of the server: `http://host:port`, `host:port` or `unix:/path` [default: http://127.0.0.1:8000, or
    /// http://127.0.0.1:50051 with --grpc]
    #[arg(long, env = "TOKENWAY_SERVER", value_name = "ADDRESS")]
    server: Option<String>,
    /// Name of the model [default: the server's only model]
    #[arg(long)]
    model: Option<String>,
    /// Maximum number of tokens to generate
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Sampling temperature, 0 to 2; 0 selects greedy decoding
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Sampling seed [default: a random seed]
    #[arg(long)]
    seed: Option<i64>,
    /// Stop string that ends the completion; may be repeated
    #[arg(long)]
    stop: Vec<String>,
}

/// Reason why a completion failed or is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is invalid.
    #[error("'{0}' is not a valid server address; use http://host:port or unix:/path")]
    Address(String),
    /// The client cannot connect.
    #[error("cannot connect to {address}: {problem}\nstart a server with `tokenway serve`")]
    Connect {
        /// Address of the server, as given on the command line.
        address: String,
        /// Error message of the operating system.
        problem: String,
    },
    /// The server does not speak the protocol of the selected API.
    #[error("{address} does not serve the {expected} API; {advice}")]
    WrongProtocol {
        /// Address of the server.
        address: String,
        /// Name of the API that the client tried: HTTP or gRPC.
        expected: &'static str,
        /// Hint on how to select the other API.
        advice: &'static str,
    },
    /// The server rejected the request, or its stream ended with an error.
    #[error("the server returned the error {code}: {message}")]
    Server {
        /// Error code.
        code: String,
        /// Error message.
        message: String,
    },
    /// The stream ended before the completion was finished.
    #[error("the completion was cut short: {0}")]
    Truncated(String),
    /// The output cannot be written.
    #[error("cannot write the completion: {0}")]
    Output(#[from] io::Error),
}

/// Streams one completion to `out`. Each token is written as soon as it arrives.
///
/// # Errors
/// Returns an error if the completion fails or is cut short. The text received before the error has been
/// written to `out`.
pub async fn complete(options: &ClientOptions, out: &mut dyn Write) -> Result<(), ClientError> {
    if options.grpc {
        grpc::complete(options, out).await?;
    } else {
        http::complete(options, out).await?;
    }
    out.write_all(b"\n")?;
    Ok(())
}

impl ClientOptions {
    fn address(&self, default: &str) -> String {
        match &self.server {
            None => default.to_owned(),
            // Adds the default scheme. The server's own flags accept addresses without a scheme, so this client
            // accepts them too.
            Some(server) if !server.contains("://") && !server.starts_with("unix:") => {
                format!("http://{server}")
            }
            Some(server) => server.clone(),
        }
    }
}

/// Writes text and flushes it, so that the text appears on the terminal at once.
fn write_text(out: &mut dyn Write, text: &str) -> Result<(), ClientError> {
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
