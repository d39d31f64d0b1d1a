//! `tokenway complete`: a client for the HTTP API and the gRPC API that streams a completion to the terminal. It uses
//! only the public API of a server.

use std::io::Write;

mod grpc;
mod http;
mod options;
mod terminal;

pub use options::{ClientError, ClientOptions};

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
