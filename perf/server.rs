//! A server that is measured, in a process of its own so that the clients do not share its runtime.
//! It must not outlive the process that started it.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::ServerUrl;
use crate::process::Usage;
use crate::serve::Role;

/// The subcommand by which this executable is started as the server.
const SUBCOMMAND: &str = "serve";

/// Which server to start.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) role: Role,
    /// The time between two tokens of a stream.
    pub(crate) interval: Duration,
    /// How many streams it runs at a time.
    pub(crate) slots: usize,
    /// How many requests may wait for a slot.
    pub(crate) queue: usize,
    /// Where its gRPC door listens; `None` is any free port.
    pub(crate) grpc_listen: Option<String>,
    /// The gateway's engine.
    pub(crate) engine: Option<String>,
}

/// Why there is no server to measure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The process cannot be started, or not be talked to.
    #[error("cannot start the server's process: {0}")]
    Process(#[from] io::Error),
    /// It ended without saying where it listens. It said why on standard error.
    #[error("the server's process did not say where it listens: {0:?}")]
    NoAddress(String),
}

/// A server in a process of its own. The process ends when this is dropped, and when the process
/// that holds this ends in any way: its standard input closes then.
pub(crate) struct OwnServer {
    child: Child,
    doors: String,
}

impl OwnServer {
    /// Starts the server, and waits until it serves.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn start(start: &Start) -> Result<Self, ServerError> {
        Self::start_with(start, &[]).await
    }

    /// Starts a product that waits so long for a peer that does nothing.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn start_with_patience(
        start: &Start,
        patience: Duration,
    ) -> Result<Self, ServerError> {
        let patience_ms = (patience.as_secs_f64() * 1e3).to_string();
        Self::start_with(start, &["--patience-ms", &patience_ms]).await
    }

    async fn start_with(start: &Start, arguments: &[&str]) -> Result<Self, ServerError> {
        let role = clap::ValueEnum::to_possible_value(&start.role);
        let role = role.expect("every role has a name");
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args([SUBCOMMAND, role.get_name()])
            .arg("--interval-ms")
            .arg((start.interval.as_secs_f64() * 1e3).to_string())
            .arg("--slots")
            .arg(start.slots.to_string())
            .arg("--queue")
            .arg(start.queue.to_string())
            .args(arguments);
        for (flag, value) in [
            ("--grpc-listen", &start.grpc_listen),
            ("--engine", &start.engine),
        ] {
            if let Some(value) = value {
                command.args([flag, value]);
            }
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut doors = String::new();
        if let Some(stdout) = &mut child.stdout {
            BufReader::new(stdout).read_line(&mut doors).await?;
        }
        if doors.is_empty() {
            return Err(ServerError::NoAddress(doors));
        }
        Ok(Self { child, doors })
    }

    /// Where its HTTP door is.
    pub(crate) fn http(&self) -> Result<ServerUrl, ServerError> {
        self.door("http=")
    }

    /// Where its gRPC door is.
    pub(crate) fn grpc(&self) -> Result<ServerUrl, ServerError> {
        self.door("grpc=")
    }

    /// What the process has used so far.
    pub(crate) fn usage(&self) -> io::Result<Usage> {
        Usage::of(self.id()?)
    }

    /// The process.
    pub(crate) fn id(&self) -> io::Result<u32> {
        let id = self.child.id();
        id.ok_or_else(|| io::Error::other("the server's process has ended"))
    }

    /// Ends the process, and waits until it has ended.
    ///
    /// # Errors
    /// When the system says so.
    pub(crate) async fn stop(mut self) -> io::Result<()> {
        self.child.kill().await
    }

    fn door(&self, label: &str) -> Result<ServerUrl, ServerError> {
        address(&self.doors, label).ok_or_else(|| ServerError::NoAddress(self.doors.clone()))
    }
}

fn address(doors: &str, label: &str) -> Option<ServerUrl> {
    doors
        .split_whitespace()
        .find_map(|door| door.strip_prefix(label))
        .map(ServerUrl::at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_are_read_as_they_are_printed() {
        let doors = "http=127.0.0.1:1 grpc=127.0.0.1:2\n";
        assert_eq!(address(doors, "http="), Some(ServerUrl::at("127.0.0.1:1")));
        assert_eq!(address(doors, "grpc="), Some(ServerUrl::at("127.0.0.1:2")));
        assert_eq!(address("grpc=127.0.0.1:2\n", "http="), None);
    }
}
