//! `tokenway`: parses, builds, serves.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env::VarError;
use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tokenway::client::{self, ClientOptions};
use tokenway::config::{self, ConfigError, Task, WorkerTask};
use tokenway::exit::{self, Code};
use tokenway::output::Output;
use tokenway::server::{ServerParts, run};
use tokenway::worker;
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

/// How long tasks may take to end once the command is over. Dropping them kills worker processes that are left.
const LAST_TASKS: Duration = Duration::from_secs(1);

/// How long the last lines may take to be written. Their reader may have stopped reading.
const LAST_LINES: Duration = Duration::from_secs(1);

const LOG_VARIABLE: &str = "TOKENWAY_LOG";

/// What is logged where the variable does not say: llama.cpp is talkative while it loads.
const DEFAULT_LOG: &str = "info,llama-cpp-2=warn";

/// Every way out leads through the last line: see [`exit`].
fn main() -> ! {
    let code = match (Output::stdout(), Output::stderr()) {
        (Ok(stdout), Ok(stderr)) => {
            report_panics(stderr.clone());
            let streams = Streams { stdout, stderr };
            let code = catch_unwind(AssertUnwindSafe(|| run(&streams))).unwrap_or(Code::Panic);
            streams.flush();
            code
        }
        (Err(error), _) | (_, Err(error)) => {
            // There is nobody else to tell.
            let _ = writeln!(io::stderr(), "tokenway: {error}");
            Code::Failure
        }
    };
    exit::now(code)
}

/// Where the program's lines go.
struct Streams {
    stdout: Output,
    stderr: Output,
}

fn run(streams: &Streams) -> Code {
    let task = match config::read(std::env::args_os()) {
        Ok(task) => task,
        Err(ConfigError::CommandLine(error)) => return explain(&error),
        Err(error) => return streams.failed(&error, Code::Usage),
    };
    let mut builder = match &task {
        // A worker's device has a thread of its own, and beside it there is one connection.
        Task::Work(_) => Builder::new_current_thread(),
        Task::Serve(_) | Task::Complete(_) => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return streams.failed(&error, Code::Failure),
    };
    let code = catch_unwind(AssertUnwindSafe(|| perform(&runtime, task, streams)));
    runtime.shutdown_timeout(LAST_TASKS);
    code.unwrap_or(Code::Panic)
}

fn perform(runtime: &Runtime, task: Task, streams: &Streams) -> Code {
    match task {
        Task::Serve(parts) => runtime.block_on(serve(*parts, streams)),
        Task::Work(worker) => runtime.block_on(work(*worker, streams)),
        Task::Complete(options) => runtime.block_on(complete(&options, streams)),
    }
}

async fn serve(parts: ServerParts, streams: &Streams) -> Code {
    if let Err(error) = log_to(&streams.stderr, Times::Told) {
        return streams.failed(&*error, Code::Usage);
    }
    match run::until_signalled(parts, (&streams.stdout, &streams.stderr)).await {
        Ok(()) => Code::Success,
        Err(error) => streams.failed(&error, Code::Failure),
    }
}

async fn work(worker: WorkerTask, streams: &Streams) -> Code {
    let times = match worker.parts.child_token {
        None => Times::Told,
        // The engine that started it writes its lines into its own log.
        Some(_) => Times::LeftOut,
    };
    if let Err(error) = log_to(&streams.stderr, times) {
        return streams.failed(&*error, Code::Usage);
    }
    match worker::attach::until_signalled(worker.parts, worker.stopping).await {
        Ok(()) => Code::Success,
        Err(error) => streams.failed(&error, Code::Failure),
    }
}

/// Its output is what it is for, so it waits for its reader, and fails where there is none.
async fn complete(options: &ClientOptions, streams: &Streams) -> Code {
    match client::complete(options, &mut io::stdout().lock()).await {
        Ok(()) => Code::Success,
        Err(error) => streams.failed(&error, Code::Failure),
    }
}

/// Prints the help, or what is wrong with the command line.
fn explain(error: &clap::Error) -> Code {
    // The reader may have gone, as `head` does.
    let _ = error.print();
    let _ = io::stdout().flush();
    if error.use_stderr() {
        Code::Usage
    } else {
        Code::Success
    }
}

/// Whether each line of the log tells its time.
#[derive(Clone, Copy)]
enum Times {
    Told,
    LeftOut,
}

/// `TOKENWAY_LOG` chooses what is logged, in the form of `tracing`'s filters.
fn log_to(stderr: &Output, times: Times) -> Result<(), Box<dyn Error>> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(filter) => filter
            .parse::<EnvFilter>()
            .map_err(|error| format!("{LOG_VARIABLE}: {error}"))?,
        Err(VarError::NotPresent) => EnvFilter::new(DEFAULT_LOG),
        Err(error) => return Err(format!("{LOG_VARIABLE}: {error}").into()),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr.clone())
        // It would tell of them by `eprintln!`, which panics where standard error cannot be written.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    match times {
        Times::Told => log.init(),
        Times::LeftOut => log.without_time().init(),
    }
    Ok(())
}

/// Rust's own report of a panic blocks while standard error is a full pipe. The text is the same.
fn report_panics(stderr: Output) {
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
    fn failed(&self, error: &dyn Error, code: Code) -> Code {
        self.stderr.line(format_args!("tokenway: {error}"));
        code
    }

    /// Waits for the last lines of both streams, for a bounded time.
    fn flush(&self) {
        let deadline = Instant::now() + LAST_LINES;
        // Nobody is left to tell of lines that cannot be written.
        let _ = self.stdout.flush_until(deadline);
        let _ = self.stderr.flush_until(deadline);
    }
}
