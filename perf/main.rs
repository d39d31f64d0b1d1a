//! `tokenway-perf` measures what a server adds to the tokens that pass through it. It reads the
//! command line and hands over; each subcommand is a module of its own.

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod arguments;
mod client;
mod compare;
mod device;
mod load;
mod metrics;
mod open_files;
mod order;
mod overhead;
mod percentiles;
mod process;
mod serve;
mod server;
mod soak;
mod stamp;
mod stamps;
mod streaming;
mod survive;
mod worker;

/// Measures what a Tokenway server, or another of its kind, adds to the tokens of a stream.
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
    Soak(soak::Options),
    Survive(survive::Options),
    #[command(hide = true)]
    Serve(serve::Options),
    #[command(hide = true)]
    Worker(Box<worker::Options>),
}

fn main() -> ExitCode {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr());
    match Cli::parse().command {
        Command::Streaming(options) => streaming::run(&options, &mut out, &mut err),
        Command::Overhead(options) => overhead::run(&options, &mut out, &mut err),
        Command::Compare(options) => compare::run(&options, &mut out, &mut err),
        Command::Soak(options) => soak::run(&options, &mut out, &mut err),
        Command::Survive(options) => survive::run(&options, &mut out, &mut err),
        Command::Serve(options) => serve::run(&options, &mut out, &mut err),
        Command::Worker(options) => worker::run(*options, &mut err),
    }
}
