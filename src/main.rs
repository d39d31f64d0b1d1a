//! `tokenway`: parses, builds, serves.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env::VarError;
use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tokenway::client::{self, ClientOptions};
use tokenway::config::{self, ConfigError, Task, WorkerTask};
use tokenway::exit::{self, ExitCode};
use tokenway::output::Output;
use tokenway::server::{ServerParts, run};
use tokenway::worker;
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

/// How long tasks may take to end once the command is over. Dropping them kills worker processes that are left.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the last lines may take to be written. Their reader may have stopped reading.
const OUTPUT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

const LOG_ENV: &str = "TOKENWAY_LOG";

/// What is logged where the variable does not say: llama.cpp is talkative while it loads.
const DEFAULT_LOG_FILTER: &str = "info,llama-cpp-2=warn";

/// Every way out leads through the last line: see [`exit`].
fn main() -> ! {
    let code = match (Output::stdout(), Output::stderr()) {
        (Ok(stdout), Ok(stderr)) => {
            install_panic_hook(stderr.clone());
            let streams = Streams { stdout, stderr };
            let code = catch_unwind(AssertUnwindSafe(|| run(&streams))).unwrap_or(ExitCode::Panic);
            streams.flush();
            code
        }
        (Err(error), _) | (_, Err(error)) => {
            // There is nobody else to tell.
            let _ = writeln!(io::stderr(), "tokenway: {error}");
            ExitCode::Failure
        }
    };
    exit::now(code)
}

/// Where the program's lines go.
struct Streams {
    stdout: Output,
    stderr: Output,
}

fn run(streams: &Streams) -> ExitCode {
    let task = match config::read(std::env::args_os()) {
        Ok(task) => task,
        Err(ConfigError::CommandLine(error)) => return print_clap_error(&error),
        Err(error) => return streams.failed(&error, ExitCode::Usage),
    };
    let mut builder = match &task {
        // A worker's device has a thread of its own, and beside it there is one connection.
        Task::Work(_) => Builder::new_current_thread(),
        Task::Serve(_) | Task::Complete(_) => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return streams.failed(&error, ExitCode::Failure),
    };
    let code = catch_unwind(AssertUnwindSafe(|| perform(&runtime, task, streams)));
    runtime.shutdown_timeout(TASK_SHUTDOWN_TIMEOUT);
    code.unwrap_or(ExitCode::Panic)
}

fn perform(runtime: &Runtime, task: Task, streams: &Streams) -> ExitCode {
    match task {
        Task::Serve(parts) => runtime.block_on(serve(*parts, streams)),
        Task::Work(worker) => runtime.block_on(work(*worker, streams)),
        Task::Complete(options) => runtime.block_on(complete(&options, streams)),
    }
}

async fn serve(parts: ServerParts, streams: &Streams) -> ExitCode {
    if let Err(error) = init_logging(&streams.stderr, LogTimestamps::Told) {
        return streams.failed(&*error, ExitCode::Usage);
    }
    match run::until_signalled(parts, (&streams.stdout, &streams.stderr)).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.failed(&error, ExitCode::Failure),
    }
}

async fn work(worker: WorkerTask, streams: &Streams) -> ExitCode {
    let times = match worker.parts.child_token {
        None => LogTimestamps::Told,
        // The engine that started it writes its lines into its own log.
        Some(_) => LogTimestamps::LeftOut,
    };
    if let Err(error) = init_logging(&streams.stderr, times) {
        return streams.failed(&*error, ExitCode::Usage);
    }
    match worker::attach::until_signalled(worker.parts, worker.stopping).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.failed(&error, ExitCode::Failure),
    }
}

/// Its output is what it is for, so it waits for its reader, and fails where there is none.
async fn complete(options: &ClientOptions, streams: &Streams) -> ExitCode {
    match client::complete(options, &mut io::stdout().lock()).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.failed(&error, ExitCode::Failure),
    }
}

/// Prints the help, or what is wrong with the command line.
fn print_clap_error(error: &clap::Error) -> ExitCode {
    // The reader may have gone, as `head` does.
    let _ = error.print();
    let _ = io::stdout().flush();
    if error.use_stderr() {
        ExitCode::Usage
    } else {
        ExitCode::Success
    }
}

/// Whether each line of the log tells its time.
#[derive(Clone, Copy)]
enum LogTimestamps {
    Told,
    LeftOut,
}

/// `TOKENWAY_LOG` chooses what is logged, in the form of `tracing`'s filters.
fn init_logging(stderr: &Output, times: LogTimestamps) -> Result<(), Box<dyn Error>> {
    let filter = match std::env::var(LOG_ENV) {
        Ok(filter) => filter
            .parse::<EnvFilter>()
            .map_err(|error| format!("{LOG_ENV}: {error}"))?,
        Err(VarError::NotPresent) => EnvFilter::new(DEFAULT_LOG_FILTER),
        Err(error) => return Err(format!("{LOG_ENV}: {error}").into()),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr.clone())
        // It would tell of them by `eprintln!`, which panics where standard error cannot be written.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    match times {
        LogTimestamps::Told => log.init(),
        LogTimestamps::LeftOut => log.without_time().init(),
    }
    Ok(())
}

/// Rust's own report of a panic blocks while standard error is a full pipe. The text is the same.
fn install_panic_hook(stderr: Output) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("<unnamed>");
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            stderr.line(format_args!("thread '{name}' {panic}\n{backtrace}"));
        } else {
            stderr.line(format_args!("thread '{name}' {panic}"));
        }
    }));
}

impl Streams {
    fn failed(&self, error: &dyn Error, code: ExitCode) -> ExitCode {
        self.stderr.line(format_args!("tokenway: {error}"));
        code
    }

    /// Waits for the last lines of both streams, for a bounded time.
    fn flush(&self) {
        let deadline = Instant::now() + OUTPUT_FLUSH_TIMEOUT;
        // Nobody is left to tell of lines that cannot be written.
        let _ = self.stdout.flush_until(deadline);
        let _ = self.stderr.flush_until(deadline);
    }
}
