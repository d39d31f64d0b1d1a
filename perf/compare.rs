//! The subcommand `compare`: the same load on any servers that stream OpenAI's completions, and on
//! Tokenway's gRPC door.
//!
//! The servers take turns in every round (A B … A B …), so that what disturbs the machine disturbs them
//! all. Nothing is expected of a server but its answers: what only stamps could tell is said to be
//! unknown where there are none.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::{Args, ValueEnum};

mod client;
mod completion;
mod html;
mod json;
mod records;
mod results;
mod seen;
mod servers;
mod table;

use results::Measured;
use servers::Servers;

use crate::arguments::duration_ms;
use crate::load::{Form, Load};
use crate::overhead::machine::Machine;
use crate::overhead::progress_of;

/// Put the same load on several servers, and compare what their clients see.
///
/// Each --http is a server with OpenAI's completions (server-sent events or NDJSON), each --grpc a Tokenway
/// server; a --name after it is what the report calls it.
///
/// Exit codes: 0 when every stream was whole; 1 when one was not; 2 when the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    servers: Servers,
    /// How many streams at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    streams: u32,
    /// How many tokens each request asks for
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// How many requests each stream makes in a round, one after the other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// How many rounds
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Over how long the streams' beginnings are spread, in milliseconds
    #[arg(long, value_name = "MS", default_value = "20", value_parser = duration_ms)]
    spread_ms: Duration,
    /// How long a request may take in all, in milliseconds
    #[arg(long, value_name = "MS", default_value = "120000", value_parser = duration_ms)]
    timeout_ms: Duration,
    /// The model to ask for. Without it the servers choose, which those that have only one can
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The form of streams to ask for over HTTP; the one that comes is read
    #[arg(long, value_enum, default_value_t = Asking::Sse)]
    form: Asking,
    /// Ask for stamps, which Tokenway's servers give: from them one-way latency is known
    #[arg(long)]
    stamps: bool,
    /// Check that each stream is token_0, token_1, … to the number asked for
    #[arg(long)]
    expect_test_runner: bool,
    /// Write all that was measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with pictures to this file, as HTML that needs nothing from elsewhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Asking {
    Sse,
    Ndjson,
}

/// What is asked of every server.
struct Asked {
    load: Load,
    model: Option<String>,
    form: Form,
    check: Check,
    /// How long a request may take.
    timeout: Duration,
}

/// What a stream's tokens must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Any,
    TestRunner,
}

/// Compares, and prints the result to `out` and what went wrong to `err`.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    // One thread for the client: a token that has been read is taken without waking up another.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let compared = runtime.and_then(|runtime| runtime.block_on(compare(options, out)));
    let faults = compared.unwrap_or_else(|error| vec![error.to_string()]);
    for fault in &faults {
        // There is nobody else to tell when even that fails.
        let _ = writeln!(err, "error: {fault}");
    }
    if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Measures and reports, and returns what went wrong.
async fn compare(options: &Options, out: &mut dyn Write) -> io::Result<Vec<String>> {
    let asked = Rc::new(Asked::of(options));
    let mut machine = Machine::now();
    let servers = measure(options, &asked).await;
    machine.ended();
    writeln!(out, "{}", table::text(&servers, &asked))?;
    if let Some(path) = &options.json {
        json::write(path, &machine, &servers, &asked).map_err(of_file("--json", path))?;
    }
    if let Some(path) = &options.html {
        html::write(path, &machine, &servers, &asked).map_err(of_file("--html", path))?;
    }
    out.flush()?;
    let faults = servers.iter().flat_map(|server| {
        let name = &server.server.name;
        server
            .faults
            .iter()
            .map(move |fault| format!("{name}, {fault}"))
    });
    Ok(faults.collect())
}

fn of_file(flag: &str, path: &std::path::Path) -> impl Fn(io::Error) -> io::Error {
    let what = format!("{flag} {}", path.display());
    move |error| io::Error::other(format!("{what}: {error}"))
}

async fn measure(options: &Options, asked: &Rc<Asked>) -> Vec<Measured> {
    let servers = &options.servers.0;
    let mut measured: Vec<_> = servers.iter().map(Measured::nothing_of).collect();
    let turns = u64::try_from(servers.len()).unwrap_or(0) * u64::from(options.rounds);
    let progress = progress_of(turns);
    for _ in 0..options.rounds {
        for measured in &mut measured {
            progress.set_message(measured.server.name.clone());
            let figures = client::turn(&measured.server.door, asked).await;
            measured.add(&figures, asked);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    measured
}

impl Asked {
    fn of(options: &Options) -> Self {
        Self {
            load: Load {
                streams: options.streams,
                requests: options.requests,
                tokens: options.tokens,
                timed: options.stamps,
                spread: options.spread_ms,
            },
            model: options.model.clone(),
            form: match options.form {
                Asking::Sse => Form::Sse,
                Asking::Ndjson => Form::Ndjson,
            },
            check: if options.expect_test_runner {
                Check::TestRunner
            } else {
                Check::Any
            },
            timeout: options.timeout_ms,
        }
    }

    /// What reports call the load.
    fn title(&self) -> String {
        let Load {
            streams,
            requests,
            tokens,
            ..
        } = self.load;
        let some = |number: u32, what: &str| match number {
            1 => format!("1 {what}"),
            number => format!("{number} {what}s"),
        };
        format!(
            "{} at once, {} of {} each",
            some(streams, "stream"),
            some(requests, "request"),
            some(tokens, "token")
        )
    }
}
