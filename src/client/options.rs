//! Options and errors of `tokenway complete`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};

use crate::certificates::{CertificateError, ClientTls, ClientTlsFiles};
use crate::cluster::ApiKey;

/// Maximum time to connect to a server.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Options of `tokenway complete`: the request and the server.
#[derive(Args, Clone, Debug)]
pub struct ClientOptions {
    /// Prompt to complete
    pub(super) prompt: String,
    /// Use the HTTP API (the default)
    #[arg(long, conflicts_with = "grpc", action = ArgAction::SetTrue)]
    pub(super) http: bool,
    /// Use the gRPC API
    #[arg(long, action = ArgAction::SetTrue)]
    pub(super) grpc: bool,
    /// Address of the server: `http://host:port`, `https://host:port` (TLS), `host:port` or `unix:/path` [default:
    /// http://127.0.0.1:8000, or http://127.0.0.1:50051 with --grpc]
    #[arg(long, env = "TOKENWAY_SERVER", value_name = "ADDRESS")]
    pub(super) server: Option<String>,
    /// CA certificates (PEM file) that verify the certificate of an https server [default: the certificate authorities
    /// of this machine]
    #[arg(long, env = "TOKENWAY_TLS_CA", value_name = "FILE")]
    pub(super) tls_ca: Option<PathBuf>,
    /// Certificate (PEM file) for a server that requires client certificates
    #[arg(
        long,
        env = "TOKENWAY_TLS_CLIENT_CERT",
        value_name = "FILE",
        requires = "tls_client_key"
    )]
    pub(super) tls_client_cert: Option<PathBuf>,
    /// Private key (PEM file) of the certificate in --tls-client-cert
    #[arg(
        long,
        env = "TOKENWAY_TLS_CLIENT_KEY",
        value_name = "FILE",
        requires = "tls_client_cert"
    )]
    pub(super) tls_client_key: Option<PathBuf>,
    /// Name of the model [default: the server's only model]
    #[arg(long)]
    pub(super) model: Option<String>,
    /// Maximum number of tokens to generate
    #[arg(long, default_value_t = 64)]
    pub(super) max_tokens: u32,
    /// Sampling temperature, 0 to 2; 0 selects greedy decoding
    #[arg(long, default_value_t = 0.0)]
    pub(super) temperature: f32,
    /// Sampling seed [default: a random seed]
    #[arg(long)]
    pub(super) seed: Option<i64>,
    /// Key for the server, from the environment variable `TOKENWAY_API_KEY`.
    #[arg(skip)]
    pub(super) api_key: Option<ApiKey>,
    /// Stop string that ends the completion; may be repeated
    #[arg(long)]
    pub(super) stop: Vec<String>,
}

/// Reason why a completion failed or is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is invalid.
    #[error(
        "'{0}' is not a valid server address; use http://host:port, https://host:port or unix:/path"
    )]
    Address(String),
    /// A file of certificates, or of a key, cannot be used.
    #[error("cannot use a TLS file: {0}")]
    Certificate(#[from] CertificateError),
    /// The client cannot connect.
    #[error(
        "cannot connect to {address}: {problem}\nstart a server with `tokenway serve`, or set --server"
    )]
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

impl ClientOptions {
    /// Sets the key that is sent to the server.
    #[must_use]
    pub fn with_api_key(mut self, key: Option<ApiKey>) -> Self {
        self.api_key = key;
        self
    }

    /// Returns the certificates for connections with TLS.
    pub(super) fn tls(&self) -> Result<ClientTls, ClientError> {
        let identity = self
            .tls_client_cert
            .clone()
            .zip(self.tls_client_key.clone());
        let tls = ClientTls::read(&ClientTlsFiles {
            ca: self.tls_ca.clone(),
            identity,
        });
        Ok(tls?)
    }

    pub(super) fn address(&self, default: &str) -> String {
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
