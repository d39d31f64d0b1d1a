//! The subcommand `overhead`: measures the cost that Tokenway adds to a token on each API, compared with floors
//! (minimal servers) in the same run.
//!
//! The measured paths take turns in every round, in an order that changes from round to round, so that a disturbance
//! of the machine disturbs them all. Only ratios and differences within a round are judged.

use std::io::Write;
use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;

mod baseline;
mod charts;
mod credentials;
mod fleet;
mod page;
mod path;
mod plan;
mod report;
mod results;
mod rounds;
mod scale;
mod scenario;
mod table;
mod targets;
mod timing;

use baseline::Baseline;
use path::MeasuredPath;
use plan::{LoadKind, Plan};
use report::Report;
pub(crate) use results::Round;
use scenario::Scenario;

use crate::report::{Machine, ReportFiles};
use crate::target;
use crate::{CommandResult, Verdict};

/// Measure the cost that each API adds to a token, compared with bare axum, bare tonic and others in the same run.
///
/// Exit codes: 0 if every token arrived once and in order, and with --check every target was reached; 1 if not; 2 if
/// the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Measure only the loads and paths that the targets need, except those of keys and TLS, in under a minute
    #[arg(long)]
    quick: bool,
    /// Number of rounds. Paced loads with one stream have 3 times as many, and so have loads with 64 streams without
    /// --quick. Loads with thousands of streams have at most 3 [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Numbers of concurrent streams, separated by commas [default: 1,64,512, or 1,64 with --quick]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    streams: Option<Vec<u32>>,
    /// Measured paths, separated by commas [default: all, or with --quick the paths that the targets need]
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    paths: Option<Vec<MeasuredPath>>,
    /// Kinds of load, separated by commas [default: all, or with --quick all but scale]
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    loads: Option<Vec<LoadKind>>,
    #[command(flatten)]
    files: ReportFiles,
    /// Write the headline chart to this file, as SVG: the distribution of one-way latency with 64 streams of 50 tokens
    /// a second
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Exit with 1 if a target is missed
    #[arg(long)]
    check: bool,
    /// Exit with 1 if a ratio is worse than in this older run, written with --json, by more than the spread of the
    /// rounds in either run
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
}

/// Load that the headline chart shows.
const HEADLINE: Scenario = Scenario::Paced(64);

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    // Read the file before the measurement, so that a wrong file fails at once.
    let baseline = options.baseline.as_deref().map(Baseline::read);
    let baseline = baseline.transpose()?;
    let plan = Plan::from_options(options);
    let has_headline = plan.loads.iter().any(|load| load.scenario == HEADLINE);
    ensure!(
        options.picture.is_none() || has_headline,
        "--picture shows {}, which --loads or --streams leave out",
        HEADLINE.title()
    );
    let mut machine = Machine::capture();
    let (results, faults) = rounds::measure_rounds(&plan).await?;
    machine.record_end();
    let report = Report::new(machine, results, faults);
    table::write_report(&report, out)?;
    let page = || page::page_values(&report);
    options.files.write(&report, "overhead.html", page)?;
    if let Some(path) = &options.picture {
        let chart = charts::latency_chart(&report.results, HEADLINE);
        crate::report::write_file("--picture", path, &chart)?;
    }
    let worse = baseline.map_or_else(Vec::new, |baseline| {
        baseline.list_regressions(&report.targets)
    });
    for line in &worse {
        writeln!(out, "WORSE {line}")?;
    }
    out.flush()?;
    let has_missed = options.check && target::has_missed(&report.targets);
    Ok(Verdict::from_report(
        report.faults.is_empty() && worse.is_empty() && !has_missed,
    ))
}
