//! The `tokenway` program: parses the command line, builds the runtime and runs the command.

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

/// Timeout for the remaining tasks after the command has ended. Dropping them kills the remaining worker processes.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Timeout for writing the last lines of output. Their reader may have stopped reading.
const OUTPUT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Environment variable with the log filter, in the syntax of [`EnvFilter`].
const LOG_ENV: &str = "TOKENWAY_LOG";

/// Log filter if [`LOG_ENV`] is not set. llama.cpp logs a lot at `info` while it loads a model.
const DEFAULT_LOG_FILTER: &str = "info,llama-cpp-2=warn";

/// Always exits through [`exit::now`]; the module [`exit`] says why.
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
            // If this write fails too, the error cannot be reported.
            let _ = writeln!(io::stderr(), "tokenway: {error}");
            ExitCode::Failure
        }
    };
    exit::now(code)
}

/// Output streams of the program.
struct Streams {
    stdout: Output,
    stderr: Output,
}

fn run(streams: &Streams) -> ExitCode {
    let task = match config::read(std::env::args_os()) {
        Ok(task) => task,
        Err(ConfigError::CommandLine(error)) => return print_clap_error(&error),
        Err(problems @ ConfigError::Check(_)) => {
            streams.stderr.line(format_args!("{problems}"));
            return ExitCode::Usage;
        }
        Err(error) => return streams.report_error(&error, ExitCode::Usage),
    };
    let mut builder = match &task {
        // A worker needs one async thread: it has one connection, and its device has a thread of its own.
        Task::Work(_) | Task::Print(_) => Builder::new_current_thread(),
        Task::Serve(_) | Task::Complete(_) => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return streams.report_error(&error, ExitCode::Failure),
    };
    let code = catch_unwind(AssertUnwindSafe(|| run_task(&runtime, task, streams)));
    runtime.shutdown_timeout(TASK_SHUTDOWN_TIMEOUT);
    code.unwrap_or(ExitCode::Panic)
}

fn run_task(runtime: &Runtime, task: Task, streams: &Streams) -> ExitCode {
    match task {
        Task::Serve(parts) => runtime.block_on(serve(*parts, streams)),
        Task::Work(worker) => runtime.block_on(run_worker(*worker, streams)),
        Task::Complete(options) => runtime.block_on(complete(&options, streams)),
        Task::Print(text) => print(&text, streams),
    }
}

/// Prints the result of a command. The command fails if standard output cannot be written.
fn print(text: &str, streams: &Streams) -> ExitCode {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

async fn serve(parts: ServerParts, streams: &Streams) -> ExitCode {
    if let Err(error) = init_logging(&streams.stderr, LogTimestamps::On) {
        return streams.report_error(&*error, ExitCode::Usage);
    }
    match run::until_signalled(parts, &streams.stdout, &streams.stderr).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

async fn run_worker(worker: WorkerTask, streams: &Streams) -> ExitCode {
    let timestamps = match worker.parts.child_token {
        None => LogTimestamps::On,
        // The engine that started this worker adds its lines to the engine's own log, with timestamps.
        Some(_) => LogTimestamps::Off,
    };
    if let Err(error) = init_logging(&streams.stderr, timestamps) {
        return streams.report_error(&*error, ExitCode::Usage);
    }
    match worker::attach::until_signalled(worker.parts, worker.stopping).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

/// Writes a completion to standard output directly. The completion is the purpose of the command, so the command waits
/// for the reader and fails if there is none.
async fn complete(options: &ClientOptions, streams: &Streams) -> ExitCode {
    match client::complete(options, &mut io::stdout().lock()).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

/// Prints the help, the version or the error that clap returned.
fn print_clap_error(error: &clap::Error) -> ExitCode {
    // The reader may have closed the pipe, as `head` does.
    let _ = error.print();
    let _ = io::stdout().flush();
    if error.use_stderr() {
        ExitCode::Usage
    } else {
        ExitCode::Success
    }
}

/// Timestamps at the start of each log line.
#[derive(Clone, Copy)]
enum LogTimestamps {
    On,
    Off,
}

/// Starts logging to `stderr`, filtered by [`LOG_ENV`].
fn init_logging(stderr: &Output, timestamps: LogTimestamps) -> Result<(), Box<dyn Error>> {
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
        // `tracing_subscriber` reports internal errors with `eprintln!`, which panics if standard error is closed.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    match timestamps {
        LogTimestamps::On => log.init(),
        LogTimestamps::Off => log.without_time().init(),
    }
    Ok(())
}

/// Reports panics through `stderr`, with the same text as Rust's default hook. The default hook would block while
/// standard error is a full pipe.
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
    fn report_error(&self, error: &dyn Error, code: ExitCode) -> ExitCode {
        self.stderr.line(format_args!("tokenway: {error}"));
        code
    }

    /// Waits until both streams have written their last lines, for at most [`OUTPUT_FLUSH_TIMEOUT`].
    fn flush(&self) {
        let deadline = Instant::now() + OUTPUT_FLUSH_TIMEOUT;
        // Lines that cannot be written are lost: there is no other stream to report them on.
        let _ = self.stdout.flush_until(deadline);
        let _ = self.stderr.flush_until(deadline);
    }
}
