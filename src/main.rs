//! The `tokenway` program: parses the command line, builds the runtime and runs the command.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::error::Error;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tokenway::allocator;
use tokenway::client::{self, ClientOptions};
use tokenway::config::{self, AfterDownload, ConfigError, ParsedCommand, ServerTask, WorkerTask};
use tokenway::exit::{self, ExitCode};
use tokenway::keys::KeysCommand;
use tokenway::logging::{self, LogFormat, Timestamps};
use tokenway::output::Output;
use tokenway::server::run;
use tokenway::worker;
use tokio::runtime::{Builder, Runtime};

/// Maximum wait for the remaining async tasks after the command has ended. Dropping a task kills its worker process.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum wait for the last lines of output, whose reader may have stopped reading.
const OUTPUT_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Never returns: the process exits through [`exit::exit_now`], for the reason given in the module [`exit`].
fn main() -> ! {
    allocator::return_large_allocations();
    let code = match (Output::stdout(), Output::stderr()) {
        (Ok(stdout), Ok(stderr)) => {
            install_panic_hook(stderr.clone());
            let streams = Streams { stdout, stderr };
            let code = catch_unwind(AssertUnwindSafe(|| run(&streams))).unwrap_or(ExitCode::Panic);
            streams.flush();
            code
        }
        (Err(error), _) | (_, Err(error)) => {
            // If this write fails too, there is no way left to report the error.
            let _ = writeln!(io::stderr(), "tokenway: {error}");
            ExitCode::Failure
        }
    };
    exit::exit_now(code)
}

/// Standard output and standard error of the program.
struct Streams {
    stdout: Output,
    stderr: Output,
}

fn run(streams: &Streams) -> ExitCode {
    let task = match config::read(std::env::args_os()) {
        Ok(task) => task,
        Err(ConfigError::CommandLine(error)) => return print_clap_error(&error),
        Err(problems @ ConfigError::Check(_)) => {
            streams.stderr.write_line(format_args!("{problems}"));
            return ExitCode::Usage;
        }
        Err(error) => return streams.report_error(&error, ExitCode::Usage),
    };
    let mut builder = match &task {
        // A worker needs only one async thread: it has one connection, and its device has a thread of its own.
        ParsedCommand::Work(_)
        | ParsedCommand::Keys(_)
        | ParsedCommand::Tls(_)
        | ParsedCommand::Print(_) => Builder::new_current_thread(),
        ParsedCommand::Serve(_) | ParsedCommand::Complete(_) => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return streams.report_error(&error, ExitCode::Failure),
    };
    let code = catch_unwind(AssertUnwindSafe(|| run_command(&runtime, task, streams)));
    runtime.shutdown_timeout(TASK_SHUTDOWN_TIMEOUT);
    code.unwrap_or(ExitCode::Panic)
}

fn run_command(runtime: &Runtime, task: ParsedCommand, streams: &Streams) -> ExitCode {
    match task {
        ParsedCommand::Serve(server) => runtime.block_on(serve(*server, streams)),
        ParsedCommand::Work(worker) => runtime.block_on(run_worker(*worker, streams)),
        ParsedCommand::Complete(options) => runtime.block_on(complete(&options, streams)),
        ParsedCommand::Keys(command) => change_keys(&command, streams),
        ParsedCommand::Tls(command) => match command.run() {
            Ok(text) => print(&text, streams),
            Err(error) => streams.report_error(&error, ExitCode::Failure),
        },
        ParsedCommand::Print(text) => print(&text, streams),
    }
}

/// Runs `tokenway keys`.
fn change_keys(command: &KeysCommand, streams: &Streams) -> ExitCode {
    match command.run() {
        Ok(output) => {
            if let Some(note) = &output.note {
                streams.stderr.write_line(format_args!("{note}"));
            }
            print(&output.result, streams)
        }
        Err(error) => streams.report_error(&error, ExitCode::Failure),
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

async fn serve(server: ServerTask, streams: &Streams) -> ExitCode {
    if let Err(error) = logging::init(&streams.stderr, server.log_format, Timestamps::On) {
        return streams.report_error(&error, ExitCode::Usage);
    }
    let on_hangup = server.on_hangup;
    let parts = match download_models(server.parts, streams).await {
        Ok(parts) => parts,
        Err(code) => return code,
    };
    match run::serve_until_signalled(parts, on_hangup, &streams.stdout, &streams.stderr).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

async fn run_worker(worker: WorkerTask, streams: &Streams) -> ExitCode {
    let timestamps = match worker.is_child {
        false => Timestamps::On,
        // An engine started this worker and adds the worker's lines to its own log, with timestamps.
        true => Timestamps::Off,
    };
    if let Err(error) = logging::init(&streams.stderr, worker.log_format, timestamps) {
        return streams.report_error(&error, ExitCode::Usage);
    }
    let parts = match download_models(worker.parts, streams).await {
        Ok(parts) => parts,
        Err(code) => return code,
    };
    match worker::attach::run_until_signalled(parts, worker.stopping).await {
        Ok(()) => ExitCode::Success,
        Err(error) => streams.report_error(&error, ExitCode::Failure),
    }
}

/// Downloads the models of a server or a worker, and builds its parts.
///
/// # Errors
/// The exit code, if the command ends here: a download failed, a signal stopped it, or a setting is invalid.
async fn download_models<T: Send + 'static>(
    parts: AfterDownload<T>,
    streams: &Streams,
) -> Result<T, ExitCode> {
    let files = match &parts.downloads {
        None => run::ModelFiles::new(),
        Some(downloads) => match run::download_until_signalled(downloads, &streams.stderr).await {
            Ok(Some(files)) => files,
            Ok(None) => return Err(ExitCode::Success),
            Err(error) => return Err(streams.report_error(&error, ExitCode::Failure)),
        },
    };
    let built = parts.build(&files);
    built.map_err(|error| streams.report_error(&error, ExitCode::Usage))
}

/// Runs `tokenway complete`. The completion is the purpose of the command, so it is written to standard output
/// directly: the command waits for the reader, and fails if the reader is gone.
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

/// Reports panics through `stderr`, with the same text as Rust's default hook. The default hook would block if
/// standard error is a full pipe. If the log is JSON, a panic becomes a log line.
fn install_panic_hook(stderr: Output) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("<unnamed>");
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
        match (logging::format(), backtrace) {
            (LogFormat::Json, backtrace) => {
                let backtrace = backtrace.map(|backtrace| backtrace.to_string());
                tracing::error!(thread, backtrace, "{panic}");
            }
            (LogFormat::Human, Some(backtrace)) => {
                stderr.write_line(format_args!("thread '{thread}' {panic}\n{backtrace}"));
            }
            (LogFormat::Human, None) => {
                stderr.write_line(format_args!("thread '{thread}' {panic}"))
            }
        }
    }));
}

impl Streams {
    fn report_error(&self, error: &dyn Error, code: ExitCode) -> ExitCode {
        match logging::format() {
            LogFormat::Human => self.stderr.write_line(format_args!("tokenway: {error}")),
            LogFormat::Json => tracing::error!("{error}"),
        }
        code
    }

    /// Waits until both streams have written their last lines, for at most [`OUTPUT_FLUSH_TIMEOUT`].
    fn flush(&self) {
        let deadline = Instant::now() + OUTPUT_FLUSH_TIMEOUT;
        // Lines that cannot be written are lost, because there is no other stream to report them on.
        let _ = self.stdout.flush_until(deadline);
        let _ = self.stderr.flush_until(deadline);
    }
}
