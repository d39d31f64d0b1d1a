//! Starts a server under test in its own process, so that clients do not share its runtime.

use std::io;
use std::net::TcpListener;
use std::process::Stdio;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::ServerUrl;
use crate::process::ResourceUsage;
use crate::serve::Options;

/// A server in its own process. The process ends when this is dropped, and also when this program ends in any way,
/// because its standard input closes then.
pub(crate) struct ServerProcess {
    child: Child,
    addresses: String,
}

impl ServerProcess {
    /// Starts the server, and waits until it has printed its addresses.
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

    pub(crate) fn http_url(&self) -> anyhow::Result<ServerUrl> {
        self.address("http=")
    }

    pub(crate) fn grpc_url(&self) -> anyhow::Result<ServerUrl> {
        self.address("grpc=")
    }

    pub(crate) fn usage(&self) -> anyhow::Result<ResourceUsage> {
        Ok(ResourceUsage::of_process(self.process_id()?)?)
    }

    pub(crate) fn process_id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the server's process has ended")
    }

    fn address(&self, label: &str) -> anyhow::Result<ServerUrl> {
        let mut addresses = self.addresses.split_whitespace();
        let address = addresses.find_map(|address| address.strip_prefix(label));
        // If the process ended before it printed the addresses, it wrote the reason to standard error.
        let missing = || {
            format!(
                "the server's process did not print its addresses: {:?}",
                self.addresses
            )
        };
        address.map(ServerUrl::from_authority).with_context(missing)
    }
}

/// Returns a TCP port of the loopback interface that is free now. Another process may take it before the caller does.
pub(crate) fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
