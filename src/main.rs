//! `tokenway`: parses, builds, serves.

use std::env::VarError;
use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use tokenway::client::{self, ClientOptions};
use tokenway::config::{self, ConfigError, Task, WorkerTask};
use tokenway::server::{ServerParts, run};
use tokenway::worker;
use tokio::runtime::Builder;
use tracing_subscriber::EnvFilter;

/// What a shell is told of settings that cannot be used.
const USAGE: u8 = 2;

const LOG_VARIABLE: &str = "TOKENWAY_LOG";

/// What is logged where the variable does not say: llama.cpp is talkative while it loads.
const DEFAULT_LOG: &str = "info,llama-cpp-2=warn";

fn main() -> ExitCode {
    let task = match config::read(std::env::args_os()) {
        Ok(task) => task,
        Err(ConfigError::CommandLine(error)) => error.exit(),
        Err(error) => return failed(&error, USAGE),
    };
    let mut builder = match &task {
        // A worker's device has a thread of its own, and beside it there is one connection.
        Task::Work(_) => Builder::new_current_thread(),
        Task::Serve(_) | Task::Complete(_) => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, 1),
    };
    match task {
        Task::Serve(parts) => runtime.block_on(serve(*parts)),
        Task::Work(worker) => runtime.block_on(work(*worker)),
        Task::Complete(options) => runtime.block_on(complete(&options)),
    }
}

async fn serve(parts: ServerParts) -> ExitCode {
    if let Err(error) = log_to_stderr(Times::Told) {
        return failed(&*error, USAGE);
    }
    match run::until_signalled(parts, &mut io::stdout()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

async fn work(worker: WorkerTask) -> ExitCode {
    let times = match worker.parts.child_token {
        None => Times::Told,
        // The engine that started it writes its lines into its own log.
        Some(_) => Times::LeftOut,
    };
    if let Err(error) = log_to_stderr(times) {
        return failed(&*error, USAGE);
    }
    match worker::attach::until_signalled(worker.parts, worker.stopping).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

async fn complete(options: &ClientOptions) -> ExitCode {
    match client::complete(options, &mut io::stdout().lock()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

/// Whether each line of the log tells its time.
#[derive(Clone, Copy)]
enum Times {
    Told,
    LeftOut,
}

/// `TOKENWAY_LOG` chooses what is logged, in the form of `tracing`'s filters.
fn log_to_stderr(times: Times) -> Result<(), Box<dyn Error>> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(filter) => filter
            .parse::<EnvFilter>()
            .map_err(|error| format!("{LOG_VARIABLE}: {error}"))?,
        Err(VarError::NotPresent) => EnvFilter::new(DEFAULT_LOG),
        Err(error) => return Err(format!("{LOG_VARIABLE}: {error}").into()),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match times {
        Times::Told => log.init(),
        Times::LeftOut => log.without_time().init(),
    }
    Ok(())
}

fn failed(error: &dyn Error, code: u8) -> ExitCode {
    // Nobody is left to tell where not even this can be written.
    let _ = writeln!(io::stderr(), "tokenway: {error}");
    ExitCode::from(code)
}
