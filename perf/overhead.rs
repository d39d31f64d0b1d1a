//! The subcommand `overhead`: what the product adds to a token on each door, against floors that are
//! measured in the same run.
//!
//! The lanes take turns in every round, in an order that changes from round to round, so that what disturbs
//! the machine disturbs them all; only ratios and differences within a round are judged.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

mod baseline;
mod charts;
pub(crate) mod drawing;
mod fleet;
mod html;
pub(crate) mod json;
mod lane;
pub(crate) mod machine;
pub(crate) mod page;
mod plan;
mod report;
mod results;
mod rounds;
mod scale;
mod scenario;
pub(crate) mod statistics;
mod table;
mod targets;
mod timing;

use baseline::{Baseline, BaselineError};
use drawing::ChartError;
use lane::Lane;
use machine::Machine;
use plan::{Kind, Plan};
use report::Report;
pub(crate) use rounds::progress_of;
use scenario::Scenario;

use crate::open_files::OpenFilesError;
use crate::server::ServerError;

/// Measure what each door adds to a token, against bare axum, bare tonic and others in the same run.
///
/// Exit codes: 0 when every token came once and in order, and with --check every target was reached; 1
/// when not; 2 when the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Only what the targets need, in under a minute
    #[arg(long)]
    quick: bool,
    /// How many rounds [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// How many streams at once, by commas [default: 1,64,512, or 1,64 with --quick]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    streams: Option<Vec<u32>>,
    /// Which lanes, by commas [default: all, or with --quick those that each load's targets need]
    #[arg(long, value_name = "LANE", value_delimiter = ',')]
    lanes: Option<Vec<Lane>>,
    /// Which kinds of load, by commas [default: all, or with --quick all but scale]
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    loads: Option<Vec<Kind>>,
    /// Write all that was measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with pictures to this file, as HTML that needs nothing from elsewhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the headline picture to this file, as SVG: what part of the tokens of 64 streams of 50 tokens a
    /// second takes how long
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Exit with 1 where a target is not reached
    #[arg(long)]
    check: bool,
    /// Exit with 1 where a ratio is worse than in this older run, written with --json, by more than the
    /// rounds of either lie apart
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    OpenFiles(#[from] OpenFilesError),
    #[error(transparent)]
    Baseline(#[from] BaselineError),
    #[error("--picture shows {}, which --loads or --streams leave out", PICTURED.title())]
    NotPictured,
    #[error(transparent)]
    Chart(#[from] ChartError),
}

/// The load of the headline picture.
const PICTURED: Scenario = Scenario::Paced(64);

/// Measures, reports and judges.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let measured = runtime
        .map_err(RunError::from)
        .and_then(|runtime| runtime.block_on(measure_and_report(options, out)));
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // There is nobody else to tell when even that fails.
            let _ = writeln!(err, "error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// True when all is as it should be.
async fn measure_and_report(options: &Options, out: &mut dyn Write) -> Result<bool, RunError> {
    // Before anything is measured: a file that is none is told at once.
    let baseline = options
        .baseline
        .as_deref()
        .map(Baseline::read)
        .transpose()?;
    let plan = Plan::of(options);
    if options.picture.is_some() && !plan.loads.iter().any(|load| load.scenario == PICTURED) {
        return Err(RunError::NotPictured);
    }
    let mut machine = Machine::now();
    let (results, faults) = rounds::measure(&plan).await?;
    machine.ended();
    let report = Report::of(machine, results, faults);
    table::write(&report, out)?;
    if let Some(path) = &options.json {
        json::write(path, &report)?;
    }
    if let Some(path) = &options.html {
        html::write(path, &report)?;
    }
    if let Some(path) = &options.picture {
        fs::write(path, charts::latency(&report.results, PICTURED)?)?;
    }
    let worse = baseline.map_or_else(Vec::new, |baseline| baseline.worse(&report.targets));
    for line in &worse {
        writeln!(out, "WORSE {line}")?;
    }
    out.flush()?;
    let missed = options.check && report.has_missed();
    Ok(report.faults.is_empty() && worse.is_empty() && !missed)
}
