//! `tokenway-perf` measures the latency and CPU time that a server adds to the tokens that pass through it. `main`
//! reads the command line and runs a subcommand; each subcommand is a module of its own.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::Builder;

mod access;
mod arguments;
mod attack;
mod compare;
mod device;
mod fault;
mod foreign_server;
mod load;
mod load_stats;
mod metrics;
mod model;
mod open_files;
mod order;
mod overhead;
mod peers;
mod process;
mod progress;
mod report;
mod serve;
mod server;
mod soak;
mod statistics;
mod stream;
mod streaming;
mod survive;
mod target;
mod timestamps;
mod worker;

/// Measures the latency and CPU time that a Tokenway server, or another LLM server, adds to streamed tokens.
#[derive(Parser)]
#[command(name = "tokenway-perf", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Streaming(streaming::Options),
    Overhead(overhead::Options),
    Compare(compare::Options),
    Peers(peers::Options),
    Model(model::Options),
    Soak(soak::Options),
    Survive(survive::Options),
    Attack(attack::Options),
    #[command(hide = true)]
    Serve(serve::Arguments),
    #[command(hide = true)]
    Worker(Box<worker::Options>),
    #[command(hide = true)]
    Attacker(Box<attack::attacker::Options>),
}

/// Exit code of [`Verdict::MissedTargets`].
const MISSED_TARGETS_CODE: u8 = 2;

/// Verdict of a subcommand that ran to its end.
enum Verdict {
    Passed,
    /// Something is wrong. Reasons that the report does not contain go to standard error, one a line.
    Failed(Vec<String>),
    /// The report names a missed target. Only `attack` has an exit code for this, different from that of a failed run.
    MissedTargets,
}

impl Verdict {
    /// Verdict of a run whose report already contains what went wrong.
    fn from_report(has_passed: bool) -> Self {
        if has_passed {
            Self::Passed
        } else {
            Self::Failed(Vec::new())
        }
    }

    fn of_failures(failures: Vec<String>) -> Self {
        if failures.is_empty() {
            Self::Passed
        } else {
            Self::Failed(failures)
        }
    }
}

/// Result of a subcommand. An error is printed like a failure.
type CommandResult = anyhow::Result<Verdict>;

fn main() -> ExitCode {
    // A server in this program then uses memory like `tokenway`.
    tokenway::allocator::return_large_allocations();
    let out = &mut io::stdout().lock();
    let outcome = match Cli::parse().command {
        Command::Streaming(options) => on_this_thread(streaming::run(&options, out)),
        Command::Overhead(options) => on_this_thread(overhead::run(&options, out)),
        Command::Compare(options) => on_this_thread(compare::run(&options, out)),
        Command::Model(options) => on_this_thread(model::run(&options, out)),
        Command::Peers(options) => on_this_thread(peers::run(&options, out)),
        Command::Soak(options) => on_this_thread(soak::run(&options, out)),
        Command::Survive(options) => on_this_thread(survive::run(&options, out)),
        Command::Attack(options) => on_this_thread(attack::run(&options, out)),
        Command::Attacker(options) => on_this_thread(attack::attacker::run(*options, out)),
        Command::Worker(options) => on_this_thread(worker::run(*options)),
        // A server under test runs on as many threads as `tokenway serve`.
        Command::Serve(arguments) => {
            run_on(Builder::new_multi_thread(), serve::run(&arguments, out))
        }
    };
    let failures = match outcome {
        Ok(Verdict::Passed) => return ExitCode::SUCCESS,
        Ok(Verdict::MissedTargets) => return ExitCode::from(MISSED_TARGETS_CODE),
        Ok(Verdict::Failed(failures)) => failures,
        Err(error) => vec![format!("{error:#}")],
    };
    for failure in failures {
        // The exit code still reports the failure if standard error is closed.
        let _ = writeln!(io::stderr(), "error: {failure}");
    }
    ExitCode::FAILURE
}

/// Runs a client on one thread, so that a token is processed by the thread that read it.
fn on_this_thread(run: impl Future<Output = CommandResult>) -> CommandResult {
    run_on(Builder::new_current_thread(), run)
}

fn run_on(mut builder: Builder, run: impl Future<Output = CommandResult>) -> CommandResult {
    builder.enable_all().build()?.block_on(run)
}
