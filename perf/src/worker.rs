//! The hidden subcommand `worker`: the worker process that a server under test starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::worker::attach::{AttachOptions, run_until_signalled};
use tokenway::worker::child::TOKEN_VARIABLE;
use tokenway::worker::engine_address::WorkerSocketAddress;
use tokio_util::sync::CancellationToken;

use crate::arguments::parse_duration_ms;
use crate::{CommandResult, Verdict};

/// Run the test runner for the server that started this process.
#[derive(Args)]
pub(crate) struct Options {
    /// Time between two tokens of a stream, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = parse_duration_ms)]
    interval_ms: Duration,
    /// Number of streams that run concurrently.
    #[arg(long)]
    slots: usize,
    /// Unix socket on which the server accepts workers.
    #[arg(long, value_parser = parse_socket)]
    engine: PathBuf,
    /// Number of the device, which is always 0.
    #[arg(long)]
    device: u16,
    /// Name of the worker in the server's log.
    #[arg(long)]
    name: String,
}

fn parse_socket(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("unix:").map(PathBuf::from);
    path.ok_or("it must be unix:/path")
}

pub(crate) async fn run(options: Options) -> CommandResult {
    let runner = TestRunnerOptions {
        interval: options.interval_ms,
        ..TestRunnerOptions::default()
    };
    let parts = AttachOptions {
        engine: WorkerSocketAddress::Unix(options.engine),
        model: String::new(),
        name: format!("{} (device {})", options.name, options.device),
        child_token: std::env::var(TOKEN_VARIABLE).ok(),
        loader: Arc::new(TestRunnerLoader::new(runner)),
        slots: options.slots,
    };
    run_until_signalled(parts, CancellationToken::new()).await?;
    Ok(Verdict::Passed)
}
