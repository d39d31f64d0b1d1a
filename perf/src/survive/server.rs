//! The server whose workers are killed: the product's own executable, in a process of its own.

use std::cell::RefCell;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::Options;
use crate::arguments::{ServerUrl, to_ms};
use crate::fault::Fault;
use crate::process::{children, rss_bytes};
use crate::stream::get;

/// Time between two checks if all workers are ready.
const READY_POLL: Duration = Duration::from_millis(50);

/// Reason why there is no server.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(
        "cannot run `tokenway` from the directory of this program: {0}; `make build` builds it"
    )]
    Io(#[from] io::Error),
    #[error("the server did not print its addresses, but: {0}")]
    NoAddress(String),
    #[error("cannot read the server's metrics: {0}")]
    Metrics(#[from] Fault),
    #[error("a stream failed before the first fault: {0}")]
    Undisturbed(Fault),
}

/// A running server.
pub(super) struct Server {
    process: u32,
    child: RefCell<Child>,
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    _lines: Lines<BufReader<ChildStdout>>,
}

/// Resident memory in bytes.
pub(super) struct Memory {
    pub(super) engine: u64,
    /// Sum over all workers.
    pub(super) workers: u64,
}

impl Server {
    /// Starts the server, and waits until all its workers are ready.
    pub(super) async fn start(options: &Options) -> Result<Self, StartError> {
        let mut child = command(options)?.spawn()?;
        let stdout = child.stdout.take();
        let stdout = stdout.ok_or_else(|| io::Error::other("its output is not piped"))?;
        let mut lines = BufReader::new(stdout).lines();
        let mut address = async || -> Result<ServerUrl, StartError> {
            let line = lines.next_line().await?.unwrap_or_default();
            let url = line
                .split_whitespace()
                .nth(1)
                .and_then(|url| url.parse().ok());
            url.ok_or(StartError::NoAddress(line))
        };
        let (http, grpc) = (address().await?, address().await?);
        let ready = lines.next_line().await?.unwrap_or_default();
        if !ready.starts_with("ready") {
            return Err(StartError::NoAddress(ready));
        }
        let server = Self {
            process: child.id().unwrap_or_default(),
            child: child.into(),
            http,
            grpc,
            _lines: lines,
        };
        while server.ready_workers().await? < f64::from(options.workers) {
            tokio::time::sleep(READY_POLL).await;
        }
        Ok(server)
    }

    /// Processes of the workers.
    pub(super) fn workers(&self) -> Vec<u32> {
        children(self.process).unwrap_or_default()
    }

    /// Sends a signal to a worker, which may have ended.
    pub(super) fn signal(worker: u32, signal: Signal) {
        let id = i32::try_from(worker).ok().and_then(Pid::from_raw);
        if let Some(id) = id {
            let _ = kill_process(id, signal);
        }
    }

    pub(super) fn memory(&self) -> Memory {
        let rss = |id| rss_bytes(id).unwrap_or(0);
        Memory {
            engine: rss(self.process),
            workers: self.workers().into_iter().map(rss).sum(),
        }
    }

    /// Metrics in Prometheus's text format.
    pub(super) async fn metrics(&self) -> Result<String, Fault> {
        get(&self.http, "/metrics").await
    }

    async fn ready_workers(&self) -> Result<f64, Fault> {
        let metrics = self.metrics().await?;
        Ok(metric(&metrics, "tokenway_workers{state=\"ready\"}").unwrap_or(0.0))
    }

    /// Kills the server.
    pub(super) fn stop(&self) -> io::Result<()> {
        self.child.borrow_mut().start_kill()
    }
}

fn command(options: &Options) -> io::Result<Command> {
    let program = std::env::current_exe()?.with_file_name("tokenway");
    let mut command = Command::new(program);
    let workers = options.workers.to_string();
    // A single worker that is left could run all streams.
    let slots = options.streams.to_string();
    command
        .args([
            "serve",
            "--http-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
        ])
        .args([
            "--isolation",
            "process",
            "--workers",
            &workers,
            "--slots",
            &slots,
        ])
        .args(["--drain-grace", "0"])
        .env("TOKENWAY_LOG", "off")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    match &options.model_path {
        Some(path) => command.args(["--threads", "1", "--model-path"]).arg(path),
        None => {
            let interval_ms = to_ms(options.interval_ms);
            command.args([
                "--runner",
                "llm_test",
                "--test-runner-frequency-ms",
                &interval_ms,
            ])
        }
    };
    Ok(command)
}

/// Value of a metric, by its name and its labels.
pub(super) fn metric(text: &str, name: &str) -> Option<f64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.trim().parse().ok()
}
