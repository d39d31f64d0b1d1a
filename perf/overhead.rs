//! The subcommand `overhead`: what the product adds to a token on each door, against floors that are
//! measured in the same run.
//!
//! The lanes take turns in every round (A B C … A B C …), so that what disturbs the machine disturbs
//! them all; only ratios and differences within a round are judged.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

mod baseline;
mod charts;
mod fleet;
mod html;
mod json;
mod lane;
mod machine;
mod results;
mod scenario;
mod statistics;
mod table;
mod targets;

use baseline::{Baseline, BaselineError};
use fleet::Fleet;
use lane::Lane;
use machine::Machine;
use results::{Results, Round};
use scenario::{PACED, Scenario, Size};

use crate::load::Session;
use crate::server::ServerError;

/// Measure what each door adds to a token, against bare axum, bare tonic and others in the same run.
///
/// Exit codes: 0 when every token came once and in order, and with --check every target was reached; 1
/// when not; 2 when the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Only the lanes and loads of the first four targets, in under a minute
    #[arg(long)]
    quick: bool,
    /// How many rounds [default: 5, or 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// How many streams at once, by commas [default: 1,64,512, or 1,64 with --quick]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    streams: Option<Vec<u32>>,
    /// Which lanes, by commas [default: all, or those of the targets with --quick]
    #[arg(long, value_name = "LANE", value_delimiter = ',')]
    lanes: Option<Vec<Lane>>,
    /// Write all that was measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with pictures to this file, as HTML that needs nothing from elsewhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
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
    Baseline(#[from] BaselineError),
}

/// What is measured.
struct Plan {
    lanes: Vec<Lane>,
    scenarios: Vec<Scenario>,
    rounds: u32,
    size: Size,
}

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
    let mut machine = Machine::now();
    let (results, faults) = plan.measure().await?;
    machine.ended();
    writeln!(out, "{}", table::text(&results))?;
    let targets = targets::judge(&results);
    table::write_targets(&targets, out)?;
    if let Some(path) = &options.json {
        json::write(path, &machine, &targets, &results)?;
    }
    if let Some(path) = &options.html {
        html::write(path, &machine, &targets, &results)?;
    }
    let worse = baseline.map_or_else(Vec::new, |baseline| baseline.worse(&targets));
    for line in &worse {
        writeln!(out, "WORSE {line}")?;
    }
    for fault in &faults {
        writeln!(out, "FAULT {fault}")?;
    }
    out.flush()?;
    let missed = targets.iter().any(|target| !target.pass);
    Ok(faults.is_empty() && worse.is_empty() && !(options.check && missed))
}

impl Plan {
    fn of(options: &Options) -> Self {
        let lanes = options.lanes.clone().unwrap_or_else(|| {
            let all = <Lane as clap::ValueEnum>::value_variants().iter().copied();
            let is_quick = |lane: &Lane| !matches!(lane, Lane::RawTcp | Lane::Sse | Lane::TwoUnix);
            all.filter(|lane| !options.quick || is_quick(lane))
                .collect()
        });
        let streams = options.streams.clone().unwrap_or_else(|| {
            if options.quick {
                vec![1, 64]
            } else {
                vec![1, 64, 512]
            }
        });
        let mut scenarios: Vec<_> = streams.iter().map(|n| Scenario::Paced(*n)).collect();
        // At full speed a single stream says little: there is nothing to share a write with.
        let full = streams.iter().filter(|n| !options.quick || **n > 1);
        scenarios.extend(full.map(|n| Scenario::Full(*n)));
        scenarios.extend([Scenario::Short, Scenario::OpenLoop]);
        Self {
            lanes,
            scenarios,
            rounds: options.rounds.unwrap_or(if options.quick { 3 } else { 5 }),
            size: if options.quick {
                Size::QUICK
            } else {
                Size::WHOLE
            },
        }
    }

    /// Runs all rounds. What went wrong with a stream is told beside the results.
    async fn measure(&self) -> Result<(Results, Vec<String>), RunError> {
        let paced = Fleet::start(&self.lanes, PACED).await?;
        let full = Fleet::start(&self.lanes, Duration::ZERO).await?;
        let (mut results, mut faults) = (Results::default(), Vec::new());
        let progress = self.progress();
        for round in 0..self.rounds {
            for scenario in &self.scenarios {
                let fleet = if scenario.interval() == PACED {
                    &paced
                } else {
                    &full
                };
                for lane in &self.lanes {
                    progress.set_message(format!("{}, {}", scenario.title(), lane.title()));
                    let measured = self.turn(fleet, *scenario, *lane, &mut results).await?;
                    let place = format!("{}, {}, round {round}", scenario.title(), lane.title());
                    faults.extend(measured.iter().map(|fault| format!("{place}: {fault}")));
                    progress.inc(1);
                }
            }
        }
        progress.finish_and_clear();
        paced.stop().await?;
        full.stop().await?;
        Ok((results, faults))
    }

    /// One lane's turn under one load; what went wrong with its streams.
    async fn turn(
        &self,
        fleet: &Fleet,
        scenario: Scenario,
        lane: Lane,
        results: &mut Results,
    ) -> Result<Vec<String>, RunError> {
        let session = match Session::open(fleet.target(lane), scenario.sockets()).await {
            Ok(session) => session,
            Err(fault) => return Ok(vec![fault.to_string()]),
        };
        let before = fleet.usage(lane)?;
        let figures = session.run(&scenario.load(self.size)).await;
        let after = fleet.usage(lane)?;
        let cpu = before
            .zip(after)
            .map(|(before, after)| after.cpu - before.cpu);
        let round = Round::of(&figures, cpu, after.map(|after| after.rss_bytes));
        results.add(scenario, lane, round, &figures.times);
        Ok(figures.faults)
    }

    fn progress(&self) -> ProgressBar {
        let turns = self.lanes.len() * self.scenarios.len();
        let turns = u64::try_from(turns).unwrap_or(0) * u64::from(self.rounds);
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(turns), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
        bar.set_style(style.expect("the template is valid"));
        bar
    }
}
