//! The server whose workers are killed: the product's own program, in a process of its own.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokenway::proto::v1::inference_client::InferenceClient;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tonic::transport::Channel;

use super::Options;
use crate::process::{children, rss_bytes};

/// Why there is nothing to be killed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("cannot run the server beside this program: {0}; `make build` makes it")]
    Io(#[from] io::Error),
    #[error("the server did not say where it listens; it said: {0}")]
    NoAddress(String),
    #[error("the server's gRPC door does not answer: {0}")]
    Door(#[from] tonic::transport::Error),
    #[error("a stream failed before anything was killed: {0}")]
    Undisturbed(String),
}

/// A server that runs.
pub(super) struct Server {
    process: u32,
    child: std::cell::RefCell<Child>,
    /// The HTTP door, as `host:port`.
    pub(super) http: String,
    pub(super) grpc: InferenceClient<Channel>,
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// Starts it, and waits until it serves with all its workers.
    pub(super) async fn start(options: &Options) -> Result<Self, StartError> {
        let program = std::env::current_exe()?.with_file_name("tokenway");
        let mut command = Command::new(program);
        let workers = options.workers.to_string();
        // A worker that is left alone could run all streams.
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
            .args(["--drain-grace", "0"]);
        match &options.model_path {
            Some(path) => command.args(["--threads", "1", "--model-path"]).arg(path),
            None => {
                let interval_ms = options.interval_ms.as_secs_f64() * 1e3;
                let interval_ms = interval_ms.to_string();
                command.args([
                    "--runner",
                    "llm_test",
                    "--test-runner-frequency-ms",
                    &interval_ms,
                ])
            }
        };
        let mut child = command
            .env("TOKENWAY_LOG", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take();
        let stdout = stdout.ok_or_else(|| io::Error::other("its output cannot be read"))?;
        let mut lines = BufReader::new(stdout).lines();
        let mut door = async || -> Result<String, StartError> {
            let line = lines.next_line().await?.unwrap_or_default();
            let url = line.split_whitespace().nth(1).map(str::to_owned);
            url.ok_or(StartError::NoAddress(line))
        };
        let (http, grpc) = (door().await?, door().await?);
        let ready = lines.next_line().await?.unwrap_or_default();
        if !ready.starts_with("ready") {
            return Err(StartError::NoAddress(ready));
        }
        let server = Self {
            process: child.id().unwrap_or_default(),
            child: child.into(),
            http: http.replace("http://", ""),
            grpc: InferenceClient::connect(grpc).await?,
            _lines: lines,
        };
        while server.ready_workers().await? < f64::from(options.workers) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(server)
    }

    /// The processes of its workers.
    pub(super) fn workers(&self) -> Vec<u32> {
        children(self.process).unwrap_or_default()
    }

    /// Sends a worker a signal. It may just have ended.
    pub(super) fn signal(worker: u32, signal: Signal) {
        let id = i32::try_from(worker).ok().and_then(Pid::from_raw);
        if let Some(id) = id {
            let _ = kill_process(id, signal);
        }
    }

    /// The memory of the engine, and of all its workers together, in bytes.
    pub(super) fn memory(&self) -> (u64, u64) {
        let of_workers = self
            .workers()
            .into_iter()
            .map(|id| rss_bytes(id).unwrap_or(0));
        (rss_bytes(self.process).unwrap_or(0), of_workers.sum())
    }

    /// What it counts, in Prometheus's text format.
    pub(super) async fn metrics(&self) -> io::Result<String> {
        let mut socket = tokio::net::TcpStream::connect(&self.http).await?;
        let request = format!("GET /metrics HTTP/1.0\r\nhost: {}\r\n\r\n", self.http);
        tokio::io::AsyncWriteExt::write_all(&mut socket, request.as_bytes()).await?;
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut socket, &mut text).await?;
        Ok(text)
    }

    async fn ready_workers(&self) -> io::Result<f64> {
        Ok(metric(&self.metrics().await?, "tokenway_workers{state=\"ready\"}").unwrap_or(0.0))
    }

    /// Ends it.
    pub(super) fn stop(&self) -> io::Result<()> {
        self.child.borrow_mut().start_kill()
    }
}

/// A metric without labels.
pub(super) fn metric(text: &str, name: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}
