//! The subcommand `compare`: puts the same load on several servers, which stream OpenAI's completions or have
//! Tokenway's gRPC API.
//!
//! The servers take turns in every round (A B … A B …), so that a disturbance of the machine disturbs them all. A
//! server only needs to answer: without timestamps, the figures that need them are unknown.

use std::io::Write;
use std::time::Duration;

use clap::Args;

mod page;
mod results;
mod servers;
mod table;

use results::{Comparison, ServerResults};
use servers::{Server, Servers};

use crate::arguments::parse_duration_ms;
use crate::fault::Fault;
use crate::load::{ConnectionPlan, Load, LoadGenerator, Target};
use crate::load_stats::LoadStats;
use crate::progress;
use crate::report::{Machine, ReportFiles};
use crate::stream::Format;
use crate::{CommandResult, Verdict};

/// Put the same load on several servers, and compare the latencies that clients see.
///
/// Each --http names a server with OpenAI's completions (server-sent events or NDJSON), each --grpc a Tokenway server.
/// A --name after either sets the server's name in the report.
///
/// Exit codes: 0 if every stream was complete; 1 if one was not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    servers: Servers,
    /// Number of concurrent streams
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    streams: u32,
    /// Number of tokens that each request asks for
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Number of requests that each stream makes in a round, one after the other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Number of rounds; in each round every server is measured once
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Time over which the starts of the streams are spread, in milliseconds
    #[arg(long, value_name = "MS", default_value = "20", value_parser = parse_duration_ms)]
    spread_ms: Duration,
    /// Time limit of a request, in milliseconds
    #[arg(long, value_name = "MS", default_value = "120000", value_parser = parse_duration_ms)]
    timeout_ms: Duration,
    /// Model to request [default: the only model of each server]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Stream format to request over HTTP; a server may answer in the other format
    #[arg(long, value_enum, default_value_t = Format::Sse)]
    form: Format,
    /// Request timestamps, from which one-way latency is computed. Only Tokenway servers send timestamps
    #[arg(long)]
    stamps: bool,
    /// Check that each stream consists of token_0, token_1, … up to the requested number of tokens
    #[arg(long)]
    expect_test_runner: bool,
    #[command(flatten)]
    files: ReportFiles,
}

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let mut machine = Machine::capture();
    let servers = measure(options).await;
    machine.record_end();
    let comparison = Comparison {
        format: results::JSON_FORMAT_VERSION,
        machine,
        load: options.load(),
        servers,
    };
    writeln!(out, "{}", table::render_tables(&comparison))?;
    let page = || page::page_values(&comparison);
    options.files.write(&comparison, "compare.html", page)?;
    out.flush()?;
    Ok(Verdict::of_failures(comparison.faults()))
}

async fn measure(options: &Options) -> Vec<ServerResults> {
    let servers = &options.servers.0;
    let mut results: Vec<_> = servers.iter().map(ServerResults::new).collect();
    let turns = u64::try_from(servers.len()).unwrap_or(0) * u64::from(options.rounds);
    let bar = progress::create_bar(turns, "{bar:30} {pos}/{len} {elapsed} {msg}");
    let load = options.load();
    for _ in 0..options.rounds {
        for results in &mut results {
            bar.set_message(results.server.name.clone());
            let stats = options.run_turn(&load, &results.server).await;
            results.add(&stats, &load);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    results
}

impl Options {
    fn load(&self) -> Load {
        Load {
            streams: self.streams,
            requests: self.requests,
            tokens: self.tokens,
            request_timestamps: self.stamps,
            every_gap: true,
            spread: self.spread_ms,
            prompt: None,
            expect_test_runner: self.expect_test_runner,
            model: self.model.clone(),
            timeout: Some(self.timeout_ms),
        }
    }

    /// Puts the load on one server.
    async fn run_turn(&self, load: &Load, server: &Server) -> LoadStats {
        let format = if server.is_grpc {
            Format::Grpc
        } else {
            self.form
        };
        let target = Target::Server(server.url.clone(), format);
        let opening = LoadGenerator::open(&target, ConnectionPlan::for_streams(self.streams));
        let opened = tokio::time::timeout(self.timeout_ms, opening).await;
        let timed_out = Err(Fault::TimedOut(self.timeout_ms.as_secs()));
        match opened.unwrap_or(timed_out) {
            Ok(generator) => generator.run(load).await,
            Err(fault) => LoadStats::from_fault(&fault),
        }
    }
}
