//! A server under test, in a process of its own so that clients do not share its runtime. It never
//! outlives the process that started it.

use std::process::Stdio;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::ServerUrl;
use crate::process::Usage;
use crate::serve::Options;

/// A server in a process of its own. The process ends when this is dropped. It also ends however the
/// process that holds this ends, because its standard input closes then.
pub(crate) struct OwnServer {
    child: Child,
    addresses: String,
}

impl OwnServer {
    /// Starts the server, and waits until it serves.
    pub(crate) async fn start(options: &Options) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", &serde_json::to_string(options)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the server's process")?;
        let mut addresses = String::new();
        if let Some(stdout) = &mut child.stdout {
            BufReader::new(stdout).read_line(&mut addresses).await?;
        }
        Ok(Self { child, addresses })
    }

    /// Address of its HTTP API.
    pub(crate) fn http(&self) -> anyhow::Result<ServerUrl> {
        self.address("http=")
    }

    /// Address of its gRPC API.
    pub(crate) fn grpc(&self) -> anyhow::Result<ServerUrl> {
        self.address("grpc=")
    }

    /// Usage of the process so far.
    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        Ok(Usage::of(self.id()?)?)
    }

    pub(crate) fn id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the server's process has ended")
    }

    fn address(&self, label: &str) -> anyhow::Result<ServerUrl> {
        let mut addresses = self.addresses.split_whitespace();
        let address = addresses.find_map(|address| address.strip_prefix(label));
        // If the process ended before it printed them, the reason is on standard error.
        let missing = || {
            format!(
                "the server's process did not print its addresses: {:?}",
                self.addresses
            )
        };
        address.map(ServerUrl::at).with_context(missing)
    }
}
