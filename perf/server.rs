//! The server that is measured when no other is named: the test runner behind both doors, in a
//! process of its own, so that the clients do not share its runtime. It must not outlive the process
//! that started it.

use std::io::{self, Write};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokenway::gateway::StreamFormat;
use tokenway::listen::{Address, Limits};
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::server::{
    Drain, EngineParts, HttpDoor, ModelParts, Server, ServerParts, Source, StartError,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::arguments::{ServerUrl, duration_ms};

/// The subcommand by which this executable is started as the server.
const SUBCOMMAND: &str = "serve-test-runner";

/// How many streams the server runs at a time.
const SLOTS: usize = 64;

const HTTP_LABEL: &str = "http=";
const GRPC_LABEL: &str = "grpc=";

/// Serve the test runner until standard input closes; the addresses are printed on one line.
#[derive(Args)]
pub(crate) struct Options {
    /// The time between two tokens of a stream, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    interval_ms: Duration,
}

/// Why there is no server to measure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The process cannot be started, or not be talked to.
    #[error("cannot start the server's process: {0}")]
    Process(#[from] io::Error),
    /// It ended without saying where it listens. It said why on standard error.
    #[error("the server's process did not say where it listens: {0:?}")]
    NoAddresses(String),
    /// The server itself did not start.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A server in a process of its own. The process ends when this is dropped, and when the process
/// that holds this ends in any way: its standard input closes then.
pub(crate) struct OwnServer {
    child: Child,
    http: ServerUrl,
    grpc: ServerUrl,
}

impl OwnServer {
    /// Starts the server, and waits until it serves.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn start(interval: Duration) -> Result<Self, ServerError> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(SUBCOMMAND)
            .arg("--interval-ms")
            .arg((interval.as_secs_f64() * 1e3).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = &mut child.stdout {
            BufReader::new(stdout).read_line(&mut line).await?;
        }
        let (http, grpc) = addresses(&line).ok_or(ServerError::NoAddresses(line))?;
        Ok(Self { child, http, grpc })
    }

    /// Where its HTTP door is.
    pub(crate) fn http(&self) -> &ServerUrl {
        &self.http
    }

    /// Where its gRPC door is.
    pub(crate) fn grpc(&self) -> &ServerUrl {
        &self.grpc
    }

    /// Ends the process, and waits until it has ended.
    ///
    /// # Errors
    /// When the system says so.
    pub(crate) async fn stop(mut self) -> io::Result<()> {
        self.child.kill().await
    }
}

fn addresses(line: &str) -> Option<(ServerUrl, ServerUrl)> {
    let (http, grpc) = line.trim_end().split_once(' ')?;
    let http = http.strip_prefix(HTTP_LABEL)?;
    let grpc = grpc.strip_prefix(GRPC_LABEL)?;
    Some((ServerUrl::at(http), ServerUrl::at(grpc)))
}

/// Is the server, in the process that [`OwnServer::start`] started.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let served = runtime
        .map_err(ServerError::from)
        .and_then(|runtime| runtime.block_on(serve(options.interval_ms, out)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nobody else to tell when even that fails.
            let _ = writeln!(err, "error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(interval: Duration, out: &mut dyn Write) -> Result<(), ServerError> {
    let server = Server::start(parts(interval)).await?;
    server.ready(|_| ()).await?;
    if let (Some(http), Some(grpc)) = (server.http_address(), server.grpc_address()) {
        writeln!(out, "{HTTP_LABEL}{http} {GRPC_LABEL}{grpc}")?;
        out.flush()?;
    }
    // Nothing is ever written to it: the read returns when it closes. Then nobody is left who would
    // notice a drain.
    let _ = tokio::io::stdin().read(&mut [0]).await;
    Ok(())
}

fn parts(interval: Duration) -> ServerParts {
    let loopback = || Address::Tcp("127.0.0.1:0".to_owned());
    let options = TestRunnerOptions {
        interval,
        ..TestRunnerOptions::default()
    };
    let model = ModelParts {
        name: "llm_test".to_owned(),
        loader: Arc::new(TestRunnerLoader::new(options)),
        workers: 1,
        slots: SLOTS,
    };
    ServerParts {
        source: Source::Engine(EngineParts {
            models: vec![model],
            queue_depth: SLOTS,
            slow_reader_timeout: Duration::from_secs(10),
        }),
        http: Some(HttpDoor {
            listen: loopback(),
            stream_format: StreamFormat::Ndjson,
        }),
        grpc: Some(loopback()),
        limits: Limits::default(),
        // A run may be long, and ends by itself.
        request_timeout: Duration::from_secs(24 * 60 * 60),
        drain: Drain {
            grace: Duration::ZERO,
            timeout: Duration::ZERO,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_are_read_as_they_are_printed() {
        let (http, grpc) = addresses("http=127.0.0.1:1 grpc=127.0.0.1:2\n").unwrap();
        assert_eq!(
            (http, grpc),
            (ServerUrl::at("127.0.0.1:1"), ServerUrl::at("127.0.0.1:2"))
        );
        assert_eq!(addresses(""), None);
    }
}
