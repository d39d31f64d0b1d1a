//! A server under test, in a process of its own so that clients do not share its runtime. It never
//! outlives the process that started it.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::{ServerUrl, to_ms};
use crate::process::Usage;
use crate::serve::Role;

/// Subcommand by which this executable runs as the server.
const SUBCOMMAND: &str = "serve";

/// Configuration of a server to start.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) role: Role,
    /// Time between two tokens of a stream.
    pub(crate) interval: Duration,
    /// Streams that run at once.
    pub(crate) slots: usize,
    /// Requests that may wait for a slot.
    pub(crate) queue: usize,
    /// Listening address of the gRPC API; `None` is any free port.
    pub(crate) grpc_listen: Option<String>,
    /// Engine behind a gateway.
    pub(crate) engine: Option<String>,
    /// Time until the product gives up an unresponsive peer; `None` is its default.
    pub(crate) peer_timeout: Option<Duration>,
}

impl Start {
    /// A server that uses any free ports and the product's default timeouts.
    pub(crate) fn new(role: Role, interval: Duration, slots: usize, queue: usize) -> Self {
        Self {
            role,
            interval,
            slots,
            queue,
            grpc_listen: None,
            engine: None,
            peer_timeout: None,
        }
    }
}

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
    pub(crate) async fn start(start: &Start) -> Result<Self, ServerError> {
        let role = clap::ValueEnum::to_possible_value(&start.role);
        let role = role.expect("every role has a name");
        let mut command = Command::new(std::env::current_exe()?);
        command.args([SUBCOMMAND, role.get_name()]);
        for (flag, value) in [
            ("--interval-ms", Some(to_ms(start.interval))),
            ("--slots", Some(start.slots.to_string())),
            ("--queue", Some(start.queue.to_string())),
            ("--grpc-listen", start.grpc_listen.clone()),
            ("--engine", start.engine.clone()),
            ("--peer-timeout-ms", start.peer_timeout.map(to_ms)),
        ] {
            if let Some(value) = value {
                command.args([flag, &value]);
            }
        }
        let mut child = command
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
        address(&self.addresses, label)
            .ok_or_else(|| ServerError::NoAddress(self.addresses.clone()))
    }
}

fn address(addresses: &str, label: &str) -> Option<ServerUrl> {
    let mut addresses = addresses.split_whitespace();
    addresses
        .find_map(|address| address.strip_prefix(label))
        .map(ServerUrl::at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_as_they_are_printed() {
        let both = "http=127.0.0.1:1 grpc=127.0.0.1:2\n";
        assert_eq!(address(both, "http="), Some(ServerUrl::at("127.0.0.1:1")));
        assert_eq!(address(both, "grpc="), Some(ServerUrl::at("127.0.0.1:2")));
        assert_eq!(address("grpc=127.0.0.1:2\n", "http="), None);
    }
}
