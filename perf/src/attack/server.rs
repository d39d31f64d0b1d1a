//! The server under attack: the executable `tokenway` with its default limits, in its own process.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::arguments::ServerUrl;

/// Name of the model that emits a token every 5 ms.
pub(super) const PACED_MODEL: &str = "paced";
/// Name of the model that emits tokens as fast as its clients read them.
pub(super) const FAST_MODEL: &str = "fast";

const SETTINGS: &str = "\
http_listen = \"127.0.0.1:0\"
grpc_listen = \"127.0.0.1:0\"

[[model]]
name = \"paced\"
test_runner_frequency_ms = 5

[[model]]
name = \"fast\"
test_runner_frequency_ms = 0
";

/// A running server. Dropping this handle ends its process.
pub(super) struct Server {
    pub(super) process: u32,
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    _child: Child,
    _lines: Lines<BufReader<ChildStdout>>,
    _folder: TempDir,
}

impl Server {
    /// Starts the server, and waits until both models are ready.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let settings = folder.path().join("tokenway.toml");
        fs::write(&settings, SETTINGS)?;
        let program = std::env::current_exe()?.with_file_name("tokenway");
        let mut child = Command::new(program)
            .args(["serve", "--drain-grace", "0", "--config"])
            .arg(&settings)
            .env("TOKENWAY_LOG", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context(
                "cannot run `tokenway` from the directory of this program; `make build` builds it",
            )?;
        let stdout = child.stdout.take().expect("its output is piped");
        let mut lines = BufReader::new(stdout).lines();
        let (mut urls, mut ready) = (Vec::new(), 0);
        while ready < 2 {
            let Some(line) = lines.next_line().await? else {
                bail!("the server ended before it was ready");
            };
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["HTTP" | "gRPC", url, ..] => urls.push(url.parse::<ServerUrl>()),
                ["ready", ..] => ready += 1,
                _ => {}
            }
        }
        let [Ok(http), Ok(grpc)] = &urls[..] else {
            bail!("the server did not print its addresses");
        };
        Ok(Self {
            process: child.id().context("the server's process has ended")?,
            http: http.clone(),
            grpc: grpc.clone(),
            _child: child,
            _lines: lines,
            _folder: folder,
        })
    }
}
