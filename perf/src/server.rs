//! A server under test, in a process of its own so that clients do not share its runtime. It never
//! outlives the process that started it.

use std::io;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::ServerUrl;
use crate::process::Usage;
use crate::serve::Options;

/// Reason why there is no server to measure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("cannot start the server's process: {0}")]
    Process(#[from] io::Error),
    /// The process ended before it printed its addresses. The reason is on standard error.
    #[error("the server's process did not print its addresses: {0:?}")]
    NoAddress(String),
}

/// A server in a process of its own. The process ends when this is dropped. It also ends however the
/// process that holds this ends, because its standard input closes then.
pub(crate) struct OwnServer {
    child: Child,
    addresses: String,
}

impl OwnServer {
    /// Starts the server, and waits until it serves.
    pub(crate) async fn start(options: &Options) -> Result<Self, ServerError> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(options.command_line())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut addresses = String::new();
        if let Some(stdout) = &mut child.stdout {
            BufReader::new(stdout).read_line(&mut addresses).await?;
        }
        if addresses.is_empty() {
            return Err(ServerError::NoAddress(addresses));
        }
        Ok(Self { child, addresses })
    }

    /// Address of its HTTP API.
    pub(crate) fn http(&self) -> Result<ServerUrl, ServerError> {
        self.address("http=")
    }

    /// Address of its gRPC API.
    pub(crate) fn grpc(&self) -> Result<ServerUrl, ServerError> {
        self.address("grpc=")
    }

    /// Usage of the process so far.
    pub(crate) fn usage(&self) -> io::Result<Usage> {
        Usage::of(self.id()?)
    }

    pub(crate) fn id(&self) -> io::Result<u32> {
        let id = self.child.id();
        id.ok_or_else(|| io::Error::other("the server's process has ended"))
    }

    /// Kills the process, and waits until it has ended.
    pub(crate) async fn stop(mut self) -> io::Result<()> {
        self.child.kill().await
    }

    fn address(&self, label: &str) -> Result<ServerUrl, ServerError> {
        let mut addresses = self.addresses.split_whitespace();
        let address = addresses.find_map(|address| address.strip_prefix(label));
        let address = address.map(ServerUrl::at);
        address.ok_or_else(|| ServerError::NoAddress(self.addresses.clone()))
    }
}
