//! The server whose workers are killed: the executable `tokenway`, in its own process.

use std::cell::RefCell;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::Options;
use crate::arguments::{ServerUrl, format_ms};
use crate::metrics::Metrics;
use crate::process::{child_ids, rss_bytes};

/// Time between two checks whether all workers are ready.
const READY_POLL: Duration = Duration::from_millis(50);

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
    /// Sum over all worker processes.
    pub(super) workers: u64,
}

impl Server {
    pub(super) async fn start(options: &Options) -> anyhow::Result<Self> {
        let missing =
            "cannot run `tokenway` from the directory of this program; `make build` builds it";
        let mut child = server_command(options)?.spawn().context(missing)?;
        let stdout = child.stdout.take().expect("its output is piped");
        let mut lines = BufReader::new(stdout).lines();
        let mut next = async || {
            let line = lines.next_line().await?.unwrap_or_default();
            let mut words = line.split_whitespace().map(str::to_owned);
            anyhow::Ok((
                words.next().unwrap_or_default(),
                words.next().unwrap_or_default(),
            ))
        };
        let addresses = [next().await?, next().await?].map(|(_, url)| url.parse());
        let (ready, _) = next().await?;
        let (true, [Ok(http), Ok(grpc)]) = (ready == "ready", addresses) else {
            bail!("the server did not print its addresses");
        };
        let server = Self {
            process: child.id().unwrap_or_default(),
            child: child.into(),
            http,
            grpc,
            _lines: lines,
        };
        while server.ready_workers().await? < options.workers.into() {
            tokio::time::sleep(READY_POLL).await;
        }
        Ok(server)
    }

    pub(super) fn worker_processes(&self) -> Vec<u32> {
        child_ids(self.process).unwrap_or_default()
    }

    pub(super) fn send_signal(worker: u32, signal: Signal) {
        let id = i32::try_from(worker).ok().and_then(Pid::from_raw);
        if let Some(id) = id {
            let _ = kill_process(id, signal);
        }
    }

    pub(super) fn measure_memory(&self) -> Memory {
        let rss = |id| rss_bytes(id).unwrap_or(0);
        Memory {
            engine: rss(self.process),
            workers: self.worker_processes().into_iter().map(rss).sum(),
        }
    }

    pub(super) async fn fetch_metrics(&self) -> anyhow::Result<Metrics> {
        let metrics = Metrics::fetch(&self.http).await;
        metrics.context("cannot read the server's metrics")
    }

    async fn ready_workers(&self) -> anyhow::Result<u64> {
        let ready = "tokenway_workers{state=\"ready\"}";
        Ok(self.fetch_metrics().await?.sum(ready).unwrap_or(0))
    }

    pub(super) fn kill(&self) -> io::Result<()> {
        self.child.borrow_mut().start_kill()
    }
}

fn server_command(options: &Options) -> io::Result<Command> {
    let program = std::env::current_exe()?.with_file_name("tokenway");
    let mut command = Command::new(program);
    let workers = options.workers.to_string();
    // Each worker has a slot for every stream, so a single remaining worker can run all streams.
    let slots = options.streams.to_string();
    command
        .args(["serve", "--isolation", "process", "--drain-grace", "0"])
        .args([
            "--http-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
        ])
        .args(["--workers", &workers, "--slots", &slots])
        .env("TOKENWAY_LOG", "off")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    match &options.model_path {
        Some(path) => command.args(["--threads", "1", "--model-path"]).arg(path),
        None => {
            let interval = format!(
                "--test-runner-frequency-ms={}",
                format_ms(options.interval_ms)
            );
            command.args(["--runner", "llm_test", &interval])
        }
    };
    Ok(command)
}
