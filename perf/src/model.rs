//! The subcommand `model`: compares Tokenway with llama.cpp's own server, and with vLLM, on the same real model.
//!
//! In every round, each scenario runs on one server after the other. Each server is the first of a round in turn. A
//! target is judged by ratios of figures of the same round, so that a slower phase of the machine affects both figures.
//! Short scenarios have many rounds on the same processes; longer ones start a new process for each measurement.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;

mod chats;
pub(crate) mod client;
mod completions;
mod interval;
mod measurement;
mod page;
pub(crate) mod prose;
mod report;
mod results;
mod scenario;
mod servers;
mod table;
mod targets;

use measurement::Measurement;
use report::{Report, Settings};
use results::Results;
use scenario::Scenario;
use servers::{RunningServer, ServerKind, ServerPlan};

use crate::fault::Fault;
use crate::progress;
use crate::report::{Machine, ReportFiles};
use crate::target;
use crate::{CommandResult, Verdict};

/// Compare Tokenway with llama.cpp's own server, with the same real model and the same number of threads.
///
/// Each server is started again for each scenario of each round, except for the rounds of decoding. Compile both
/// programs for this processor, as `scripts/model_perf.sh` does, which then runs this command.
///
/// Exit codes: 0 if every reply was complete, the servers counted the same prompt tokens (to within 1 %), and with
/// --check every target was reached; 1 if not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// GGUF file of the model
    #[arg(long, value_name = "FILE", env = "TOKENWAY_MODEL_PATH")]
    model_path: PathBuf,
    /// Program of llama.cpp's server, such as the one that `scripts/llama_server.sh` builds
    #[arg(long, value_name = "FILE")]
    llama_server: PathBuf,
    /// Program of Tokenway, built with llama.cpp [default: `tokenway` in the directory of this program]
    #[arg(long, value_name = "FILE")]
    tokenway: Option<PathBuf>,
    /// Script that starts vLLM, such as scripts/vllm.sh after `scripts/vllm.sh install`. The script chooses the model:
    /// scripts/vllm.sh serves the one of scripts/model.sh, with float32 weights. vLLM takes about a minute to start, in
    /// each scenario of each round
    #[arg(long, value_name = "FILE")]
    vllm: Option<PathBuf>,
    /// Number of rounds. With a multiple of the number of servers, each server is the first equally often. The
    /// decoding scenarios, which are short, have sixteen times as many
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Scenarios to measure, separated by commas [default: all]
    #[arg(long, value_name = "SCENARIO", value_delimiter = ',')]
    only: Option<Vec<Scenario>>,
    /// Number of threads for computing the model
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    #[command(flatten)]
    files: ReportFiles,
    /// Write a chart of the figures that have a target to this file, as SVG
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Exit with 1 if a target is missed
    #[arg(long)]
    check: bool,
}

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let plans = options.server_plans()?;
    let settings = Settings::of_servers(&plans, options.rounds).await?;
    let mut machine = Machine::capture();
    let (results, faults) = measure(options, &plans).await?;
    machine.record_end();
    let report = Report::new(machine, settings, results, faults);
    table::write_report(&report, out)?;
    options
        .files
        .write(&report, "model.html", || page::page_values(&report))?;
    if let Some(path) = &options.picture {
        crate::report::write_file("--picture", path, &page::draw_picture(&report.results))?;
    }
    out.flush()?;
    let has_missed = options.check && target::has_missed(&report.targets);
    Ok(Verdict::from_report(
        report.faults.is_empty() && !has_missed,
    ))
}

impl Options {
    fn server_plans(&self) -> anyhow::Result<Vec<ServerPlan>> {
        let tokenway = self.tokenway.clone();
        let tokenway = tokenway.map_or_else(servers::own_tokenway, Ok)?;
        let plan = |kind, program| ServerPlan {
            kind,
            program,
            model_path: self.model_path.clone(),
            threads: self.threads,
        };
        let llama_server = self.llama_server.clone();
        let plans = [
            plan(ServerKind::Tokenway, tokenway),
            plan(ServerKind::LlamaCpp, llama_server),
        ];
        let vllm = self
            .vllm
            .clone()
            .map(|program| plan(ServerKind::Vllm, program));
        Ok(plans.into_iter().chain(vllm).collect())
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let all = || Scenario::value_variants().to_vec();
        self.only.clone().unwrap_or_else(all)
    }
}

/// Measures all rounds. Returns the results, and a description of each fault.
async fn measure(
    options: &Options,
    plans: &[ServerPlan],
) -> anyhow::Result<(Results, Vec<String>)> {
    let (mut results, mut faults) = (Results::default(), Vec::new());
    let blocks = blocks(&options.scenarios(), options.rounds);
    let rounds: u64 = blocks.iter().map(|block| u64::from(block.len())).sum();
    let count = rounds * u64::try_from(plans.len())?;
    let bar = progress::create_bar(count, "{bar:30} {pos}/{len} {elapsed} {msg}");
    for block in blocks {
        let scenario = block.scenario;
        for turn in measure_block(block, plans, &bar).await? {
            let measured = turn.measured.map_err(|fault| {
                let (server, scenario) = (turn.server.title(), scenario.title());
                faults.push(format!(
                    "{server}, {scenario}, round {}: {fault}",
                    turn.round + 1
                ));
            });
            results.add(scenario, turn.server, measured.ok());
        }
    }
    bar.finish_and_clear();
    Ok((results, faults))
}

/// Rounds of one scenario that directly follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    scenario: Scenario,
    rounds: Range<u32>,
}

impl Block {
    fn len(&self) -> u32 {
        self.rounds.end - self.rounds.start
    }
}

/// Returns the blocks of a run in order.
fn blocks(scenarios: &[Scenario], rounds: u32) -> Vec<Block> {
    let of_round = |round: u32| {
        scenarios.iter().map(move |scenario| {
            let factor = scenario.rounds_factor();
            Block {
                scenario: *scenario,
                rounds: round * factor..(round + 1) * factor,
            }
        })
    };
    (0..rounds).flat_map(of_round).collect()
}

/// A round of a scenario on one server. The error is a fault of the scenario; the other scenarios and servers are still
/// measured.
struct Turn {
    server: ServerKind,
    round: u32,
    measured: Result<Measurement, Fault>,
}

/// Measures all rounds of a block on all servers. The servers of an alternating scenario run during the whole block;
/// others are started for each measurement.
async fn measure_block(
    block: Block,
    plans: &[ServerPlan],
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Turn>> {
    let (scenario, mut turns) = (block.scenario, Vec::new());
    let mut running = BTreeMap::new();
    for round in block.rounds {
        for plan in turn_order(plans, round) {
            bar.set_message(format!("{}: {}", plan.kind.title(), scenario.title()));
            let server = match running.remove(&plan.kind) {
                Some(server) => server,
                None => plan.start().await?,
            };
            let measured = measure_server(&server, scenario, round).await;
            turns.push(Turn {
                server: plan.kind,
                round,
                measured,
            });
            bar.inc(1);
            if scenario.is_alternating() {
                running.insert(plan.kind, server);
            } else {
                stop(server).await?;
            }
        }
    }
    for server in running.into_values() {
        stop(server).await?;
    }
    Ok(turns)
}

/// Returns the servers in the order in which they run in a round. The order is rotated from round to round.
fn turn_order(plans: &[ServerPlan], round: u32) -> impl Iterator<Item = &ServerPlan> {
    let round = usize::try_from(round).unwrap_or(0);
    let (last, first) = plans.split_at(round % plans.len());
    first.iter().chain(last)
}

async fn measure_server(
    server: &RunningServer,
    scenario: Scenario,
    round: u32,
) -> Result<Measurement, Fault> {
    let measured = scenario.run(&server.client, round).await;
    let mut measured = measured.and_then(Measurement::checked)?;
    // `None` if the process has ended.
    measured.rss_bytes = server.process.usage().ok().map(|usage| usage.rss_bytes);
    Ok(measured)
}

async fn stop(server: RunningServer) -> anyhow::Result<()> {
    let stopped = server.process.stop().await;
    stopped.context("cannot stop a server")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans<const N: usize>(kinds: [ServerKind; N]) -> [ServerPlan; N] {
        kinds.map(|kind| ServerPlan {
            kind,
            program: PathBuf::new(),
            model_path: PathBuf::new(),
            threads: 1,
        })
    }

    #[test]
    fn each_server_is_the_first_of_a_round_in_turn() {
        use ServerKind::{LlamaCpp, Tokenway, Vllm};
        let plans = plans([Tokenway, LlamaCpp, Vllm]);
        let order = |round| -> Vec<_> { turn_order(&plans, round).map(|plan| plan.kind).collect() };
        assert_eq!(order(0), [Tokenway, LlamaCpp, Vllm]);
        assert_eq!(order(1), [LlamaCpp, Vllm, Tokenway]);
        assert_eq!(order(2), [Vllm, Tokenway, LlamaCpp]);
        assert_eq!(order(3), order(0));
    }

    #[test]
    fn decoding_has_sixteen_rounds_in_a_row_for_each_round_of_the_others() {
        let scenarios = [Scenario::DecodeOne, Scenario::LongPrompt];
        let blocks = blocks(&scenarios, 2);
        let found: Vec<_> = blocks
            .into_iter()
            .map(|block| (block.scenario, block.rounds))
            .collect();
        let expected = [
            (Scenario::DecodeOne, 0..16),
            (Scenario::LongPrompt, 0..1),
            (Scenario::DecodeOne, 16..32),
            (Scenario::LongPrompt, 1..2),
        ];
        assert_eq!(found, expected);
    }
}
