//! The worker of a server whose worker is a process of its own. The server starts it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::worker::attach::{AttachError, AttachOptions, until_signalled};
use tokenway::worker::child::TOKEN_VARIABLE;
use tokenway::worker::engine_address::EngineAddress;
use tokio_util::sync::CancellationToken;

use crate::arguments::duration_ms;

/// Run the test runner for a server that has started this.
#[derive(Args)]
pub(crate) struct Options {
    /// The time between two tokens of a stream, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    interval_ms: Duration,
    /// How many streams run at a time.
    #[arg(long)]
    slots: usize,
    /// The server's worker socket.
    #[arg(long, value_parser = socket)]
    engine: PathBuf,
    /// Which device it is for: there is one.
    #[arg(long)]
    device: u16,
    /// What the server calls it.
    #[arg(long)]
    name: String,
}

fn socket(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("unix:").map(PathBuf::from);
    path.ok_or("it must be unix:/path")
}

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// Is the worker, in the process that was started for it.
pub(crate) fn run(options: Options, err: &mut dyn Write) -> ExitCode {
    match work(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nobody else to tell when even that fails.
            let _ = writeln!(err, "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(options: Options) -> Result<(), WorkerError> {
    // As the product's own worker: its device has a thread besides.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let runner = TestRunnerOptions {
        interval: options.interval_ms,
        ..TestRunnerOptions::default()
    };
    let parts = AttachOptions {
        engine: EngineAddress::Unix(options.engine),
        model: String::new(),
        name: format!("{} (device {})", options.name, options.device),
        child_token: std::env::var(TOKEN_VARIABLE).ok(),
        loader: Arc::new(TestRunnerLoader::new(runner)),
        slots: options.slots,
    };
    runtime.block_on(until_signalled(parts, CancellationToken::new()))?;
    Ok(())
}
