//! The errors with which a server fails to start.

use std::io;

use crate::keys::KeysError;
use crate::listen::Address;

/// Reason why a server failed to start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The server cannot listen on an address.
    #[error(
        "cannot listen on {address}: {}; choose another address with --{setting}",
        bind_error_reason(address, source)
    )]
    Listen {
        /// Name of the setting that contains the address.
        setting: &'static str,
        /// Address that cannot be bound.
        address: Address,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The keys file or the usage file cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// A worker thread cannot be started.
    #[error("cannot start a worker thread: {0}")]
    Thread(io::Error),
    /// The folder for the worker socket cannot be created.
    #[error(
        "cannot create a folder for the worker socket: {0}; choose the socket with --worker-listen"
    )]
    WorkerSocket(io::Error),
    /// A remote engine is listed twice, or is this server itself.
    #[error("{0}")]
    Engine(String),
    /// A model cannot be loaded.
    #[error("cannot load the model '{model}': {reason}")]
    Model {
        /// Name of the model.
        model: String,
        /// Error message of the model's runner.
        reason: String,
    },
    /// The server stopped before all models were loaded.
    #[error("the server stopped before its models were loaded")]
    Ended,
}

/// Returns the reason why an address cannot be bound. For a Unix socket in a missing folder, the reason names the
/// folder.
fn bind_error_reason(address: &Address, source: &io::Error) -> String {
    let folder = match address {
        Address::Unix(path) => path.parent().filter(|folder| !folder.exists()),
        Address::Tcp(_) => None,
    };
    match folder {
        Some(folder) => format!("the folder {} does not exist", folder.display()),
        None => source.to_string(),
    }
}
