//! The subcommand `attack`: attacks a server in many ways, and measures how much other clients notice.
//!
//! Each attack has its own server. During the attack, one stream on each API (a *bystander*) receives a token every
//! 5 ms. The attackers run in a separate process, so that their work does not delay the threads that time the
//! bystanders.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::time::{Instant, sleep};

pub(crate) mod attacker;
mod bodies;
mod bystanders;
mod connections;
mod floods;
mod frames;
mod kind;
mod memory;
mod priority;
mod readers;
mod row;
mod server;
mod streams;

use attacker::AttackerProcess;
use bystanders::Bystanders;
use kind::AttackKind;
use memory::Memory;
use row::Row;
use server::Server;

use crate::arguments::parse_seconds;
use crate::process::ResourceUsage;
use crate::report::{Machine, write_file};
use crate::{CommandResult, Verdict, open_files, progress};

/// Time before an attack in which the bystanders' streams start and the server's memory settles.
const SETTLING_TIME: Duration = Duration::from_secs(1);
/// Time from the end of an attack until the server's memory is measured.
const RELEASE_TIME: Duration = Duration::from_secs(10);
/// Number of files that the server and the attackers may each have open.
const OPEN_FILES: u32 = 4_096;

/// Attack a server in many ways, and measure the longest gaps between the tokens of other clients' streams.
///
/// Each attack gets a new server: `tokenway serve` from the directory of this program, with its default limits. The
/// rows `none` (no attack) and `busy-core` (a process that only keeps one core busy) are for comparison. Attackers,
/// bystanders and the server share the machine's cores, so the server does not cause a gap in these rows. The attackers
/// have a lower priority.
///
/// Targets of each attack: no token lost, gaps of at most 50 ms, at most 256 MiB of memory, at most twice the memory
/// of the idle server 10 s after the end, and no connection or stream left that the server should have ended.
///
/// Exit codes: 0 if every attack was measured; 1 if not; 2 if --check is given and a target was missed, or if the
/// arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Attacks, separated by spaces or commas [default: all]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    only: Vec<AttackKind>,
    /// Duration of each attack in seconds. Attacks with large bodies end earlier, once all requests are answered
    /// [default: 10; up to 60 for large bodies, and 65 for clients that the server must end]
    #[arg(long, value_name = "N", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// Write all measurements to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with 2 if a target is missed
    #[arg(long)]
    check: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    machine: &'a Machine,
    rows: &'a [Row],
}

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    open_files::raise_limit(OPEN_FILES)?;
    priority::raise();
    let kinds = if options.only.is_empty() {
        AttackKind::value_variants()
    } else {
        &options.only
    };
    let mut machine = Machine::capture();
    writeln!(out, "{}", row::head())?;
    let steps = u64::try_from(kinds.len()).unwrap_or(u64::MAX);
    let bar = progress::create_bar(steps, "{bar:30} {pos}/{len} {elapsed} {msg}");
    let mut rows = Vec::new();
    for kind in kinds {
        let row = measure(*kind, options.seconds, &bar).await?;
        bar.suspend(|| writeln!(out, "{row}"))?;
        out.flush()?;
        rows.push(row);
        bar.inc(1);
    }
    bar.finish_and_clear();
    machine.record_end();
    let missed: Vec<_> = rows.iter().flat_map(Row::missed_targets).collect();
    for line in &missed {
        writeln!(out, "MISSED {line}")?;
    }
    out.flush()?;
    if let Some(path) = &options.json {
        let machine = &machine;
        let rows = &rows;
        let json = serde_json::to_string(&Report { machine, rows })? + "\n";
        write_file("--json", path, &json)?;
    }
    Ok(if options.check && !missed.is_empty() {
        Verdict::MissedTargets
    } else {
        Verdict::Passed
    })
}

/// Runs one attack on a new server.
async fn measure(
    kind: AttackKind,
    duration: Option<Duration>,
    bar: &ProgressBar,
) -> anyhow::Result<Row> {
    bar.set_message(format!("{}: preparing", kind.name()));
    let duration = duration.unwrap_or(kind.duration());
    let server = Server::start().await?;
    let bystanders = Bystanders::start(&server.http, &server.grpc)?;
    let attacker = AttackerProcess::start(kind, duration, &server).await?;
    sleep(SETTLING_TIME).await;
    let mut memory = Memory::start(server.process)?;
    let before = ResourceUsage::of_process(server.process)?.cpu;
    bystanders.forget_gaps();
    bar.set_message(format!("{}: attacking", kind.name()));
    let began = Instant::now();
    let outcome = attacker.attack(duration).await?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = ResourceUsage::of_process(server.process)?.cpu - before;
    bar.set_message(format!("{}: measuring the memory afterwards", kind.name()));
    sleep(RELEASE_TIME).await;
    memory.record_end()?;
    Ok(Row {
        attack: kind,
        seconds,
        http: bystanders.http.stop(),
        grpc: bystanders.grpc.stop(),
        server_cores: cpu.as_secs_f64() / seconds,
        memory,
        outcome,
    })
}
