//! `tokenway complete`: a client for either door that streams a completion to the terminal. It knows a
//! server only by its public contract.

use std::io::{self, Write};
use std::time::Duration;

use clap::{ArgAction, Args};

mod grpc;
mod http;

/// How long a server may take to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is asked of which server.
#[derive(Args, Clone, Debug)]
pub struct ClientOptions {
    /// What to complete
    prompt: String,
    /// Ask the HTTP door (the default)
    #[arg(long, conflicts_with = "grpc", action = ArgAction::SetTrue)]
    http: bool,
    /// Ask the gRPC door
    #[arg(long, action = ArgAction::SetTrue)]
    grpc: bool,
    /// The door's address, `http://host:port`, `host:port` or `unix:/path` [default: http://127.0.0.1:8000, or
    /// http://127.0.0.1:50051 with --grpc]
    #[arg(long, env = "TOKENWAY_SERVER", value_name = "ADDRESS")]
    server: Option<String>,
    /// The model [default: the server's only one]
    #[arg(long)]
    model: Option<String>,
    /// The most tokens to generate
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Sampling temperature, 0 to 2; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Seeds the sampling [default: one is drawn]
    #[arg(long)]
    seed: Option<i64>,
    /// A string that ends the completion; may be repeated
    #[arg(long)]
    stop: Vec<String>,
}

/// Why a completion is not whole.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("'{0}' is no address of a server; it must be http://host:port or unix:/path")]
    Address(String),
    /// Nobody answers.
    #[error("no server answers at {address}: {problem}\n`tokenway serve` starts one")]
    Connect {
        /// Where.
        address: String,
        /// What the system says.
        problem: String,
    },
    /// Somebody answers, but not what the other door would.
    #[error("{address} is no {asked} door; {advice}")]
    WrongProtocol {
        /// Where.
        address: String,
        /// Which door was asked for.
        asked: &'static str,
        /// How the other one is asked.
        advice: &'static str,
    },
    /// The server refused the request, or its stream failed.
    #[error("the server says {code}: {message}")]
    Server {
        /// The error's code.
        code: String,
        /// What happened.
        message: String,
    },
    /// The stream ended before its end.
    #[error("the completion was cut short: {0}")]
    Truncated(String),
    /// The terminal takes no more.
    #[error("cannot write the completion: {0}")]
    Output(#[from] io::Error),
}

/// Streams one completion to `out`, each token as it comes.
///
/// # Errors
/// Whatever keeps the completion from being whole; what came before has been written.
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
            // As addresses are written elsewhere on the command line.
            Some(server) if !server.contains("://") && !server.starts_with("unix:") => {
                format!("http://{server}")
            }
            Some(server) => server.clone(),
        }
    }
}

fn show(out: &mut dyn Write, text: &str) -> Result<(), ClientError> {
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
