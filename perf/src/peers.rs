//! The subcommand `peers`: compares Tokenway's gateway with others in front of the same engine with OpenAI's API. The
//! servers take turns in every round, and only ratios within a round are judged.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

mod fleet;

use fleet::{ENGINE, INTERVAL, Peer, TOKENWAY};

use crate::load::{ConnectionPlan, Load, LoadGenerator};
use crate::overhead::Round;
use crate::report::{Machine, format_spread};
use crate::serve::openai::{FULL_SPEED, MODEL, TOKENIZED};
use crate::statistics::{Spread, count_to_f64};
use crate::target::{Bound, TargetResult};
use crate::{CommandResult, Verdict};

/// Number of streams, and number of concurrent requests with a long prompt.
const STREAMS: u32 = 64;
const LONG_PROMPTS: u32 = 16;
/// Number of lines of a long prompt, which has 470 KB.
const PROMPT_LINES: usize = 6_000;

/// Compare the gateway with SMG, LiteLLM and Envoy, in front of the same engine.
///
/// Prints two tables as Markdown: the figures of each server, as the median of the rounds with the lowest and the
/// highest, and the targets. A server without a program is left out.
///
/// Exit codes: 0 if every token arrived once and in order; 1 if not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Number of rounds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of the paced load of each server in a round, in seconds
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Maximum number of tokens that the engine writes as one chunk. vLLM and llama.cpp write each token as a chunk
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    tokens_per_chunk: u32,
    /// Program of SMG, such as .venv-peers/bin/smg
    #[arg(long, value_name = "FILE", env = "SMG")]
    smg: Option<PathBuf>,
    /// Program of LiteLLM's proxy, such as .venv-peers/bin/litellm. It is slow, so it gets a fiftieth of each load
    /// except the paced one
    #[arg(long, value_name = "FILE", env = "LITELLM")]
    litellm: Option<PathBuf>,
    /// Program of Envoy, such as .venv-peers/bin/envoy
    #[arg(long, value_name = "FILE", env = "ENVOY")]
    envoy: Option<PathBuf>,
}

/// One round of a server: paced streams, streams at full speed, requests with long prompts, and the same with an engine
/// that tokenizes them.
type Turn = [Round; 4];

/// A figure of a round: its name, its number of decimals, and its value.
type Figure = (&'static str, usize, fn(&Turn) -> Option<f64>);

const FIGURES: [Figure; 8] = [
    ("one-way p50 µs", 0, |of| Some(of[0].one_way_p50_us)),
    ("one-way p99 µs", 0, |of| Some(of[0].one_way_p99_us)),
    ("CPU µs/token, paced", 1, |of| of[0].cpu_us_per_token),
    ("tokens/s, full speed", 0, |of| {
        Some(of[1].rates.tokens_per_second)
    }),
    ("CPU µs/token, full speed", 2, |of| of[1].cpu_us_per_token),
    ("RSS MiB after it", 0, |of| {
        Some(count_to_f64(of[1].rss_bytes?) / 1_048_576.0)
    }),
    ("requests/s, 470 KB prompts", 0, |of| {
        Some(of[2].rates.requests_per_second)
    }),
    ("requests/s, tokenized", 1, |of| {
        Some(of[3].rates.requests_per_second)
    }),
];
/// Position of the only figure of which the engine's share is left out: a gateway adds to the engine's latency.
const ADDED: usize = 0;

/// A target of Tokenway: a limit on the ratio of its figure to the same figure of another server.
struct TargetSpec {
    /// Position of the figure in [`FIGURES`].
    figure: usize,
    /// Name of the other server.
    other: &'static str,
    bound: Bound,
    limit: f64,
}

const TARGETS: [TargetSpec; 8] = [
    at_most(ADDED, "SMG", 0.8),
    at_most(ADDED, "Envoy", 1.0),
    at_most(2, "SMG", 1.0),
    at_least(3, "SMG", 1.1),
    at_most(4, "SMG", 1.0),
    at_most(5, "SMG", 0.4),
    at_least(6, "SMG", 1.1),
    at_least(7, ENGINE, 0.9),
];

const fn at_most(figure: usize, other: &'static str, limit: f64) -> TargetSpec {
    TargetSpec {
        figure,
        other,
        bound: Bound::AtMost,
        limit,
    }
}

const fn at_least(figure: usize, other: &'static str, limit: f64) -> TargetSpec {
    TargetSpec {
        bound: Bound::AtLeast,
        ..at_most(figure, other, limit)
    }
}

/// A server and its rounds.
type Results = (Peer, Vec<Turn>);

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let mut machine = Machine::capture();
    let mut faults = Vec::new();
    let rounds = usize::try_from(options.rounds)?;
    let peers = fleet::start(options).await?;
    let turns = vec![Turn::default(); rounds];
    let results = peers.into_iter().map(|peer| (peer, turns.clone()));
    let mut results: Vec<Results> = results.collect();
    let count = results.len();
    let loads = loads(options.seconds);
    // Long prompts come last, because they leave a process with more memory.
    for which in [0..2, 2..4] {
        for round in 0..rounds {
            // Each server is the first of a round in turn.
            for at in (0..count).map(|at| (at + round) % count) {
                let (peer, turns) = &mut results[at];
                let measured = loads[which.clone()]
                    .iter()
                    .zip(&mut turns[round][which.clone()]);
                for (load, result) in measured {
                    *result = run_load(peer, load, &mut faults).await?;
                }
            }
        }
    }
    machine.record_end();
    let Machine {
        cores,
        load_before,
        load_after,
        build,
        commit,
        ..
    } = &machine;
    writeln!(
        out,
        "{rounds} rounds on {cores} cores, load average {load_before} to {load_after}, {build} build, commit {commit}\n"
    )?;
    write_figures(&results, out)?;
    let turns_of = |name: &str| {
        let (_, turns) = results.iter().find(|(peer, _)| peer.name == name)?;
        Some(turns.as_slice())
    };
    write_targets(&judge_targets(turns_of), out)?;
    Ok(Verdict::of_failures(faults))
}

/// Returns the loads of a turn.
fn loads(seconds: u32) -> [Load; 4] {
    let paced = Load {
        tokens: seconds * 100,
        spread: INTERVAL,
        model: Some(MODEL.to_owned()),
        timeout: Some(Duration::from_secs(120)),
        ..Load::of_test_runner(STREAMS, 1)
    };
    let full = Load {
        tokens: seconds * 10_000,
        prompt: Some(FULL_SPEED.into()),
        spread: Duration::ZERO,
        ..paced.clone()
    };
    let lines = "The quick brown fox jumps over the lazy dog, and the dog sleeps on \"as ever\".\n";
    let prompt = |first_line| format!("{first_line}\n{}", lines.repeat(PROMPT_LINES));
    let long = Load {
        streams: LONG_PROMPTS,
        requests: seconds * 25,
        tokens: 1,
        prompt: Some(prompt(FULL_SPEED).into()),
        ..full.clone()
    };
    let tokenized = Load {
        requests: seconds,
        prompt: Some(prompt(TOKENIZED).into()),
        ..long.clone()
    };
    [paced, full, long, tokenized]
}

/// Puts a load on a server, after a short warm-up.
async fn run_load(peer: &Peer, load: &Load, faults: &mut Vec<String>) -> anyhow::Result<Round> {
    let plan = ConnectionPlan::for_streams(load.streams);
    let generator = LoadGenerator::open(&peer.target, plan).await?;
    let load = &peer.part_of(load);
    let warm_up = Load {
        tokens: load.tokens.div_ceil(20),
        requests: load.requests.div_ceil(5),
        ..load.clone()
    };
    generator.run(&warm_up).await;
    let before = peer.usage()?;
    let stats = generator.run(load).await;
    let after = peer.usage()?;
    faults.extend(
        stats
            .faults
            .iter()
            .map(|fault| format!("{}: {fault}", peer.name)),
    );
    let cpu = after.cpu - before.cpu;
    Ok(Round::from_stats(&stats, Some(cpu), Some(after.rss_bytes)))
}

fn write_figures(results: &[Results], out: &mut dyn Write) -> io::Result<()> {
    let names = FIGURES.map(|(name, ..)| name);
    writeln!(
        out,
        "| | {} |\n|---{}|",
        names.join(" | "),
        "|---".repeat(names.len())
    )?;
    for (peer, turns) in results {
        let cells = FIGURES.map(|(_, decimals, value)| {
            format_spread(Spread::from_rounds(turns.iter().map(value)), decimals)
        });
        writeln!(out, "| {} | {} |", peer.name, cells.join(" | "))?;
    }
    Ok(())
}

/// Judges the targets whose figures were measured. `turns_of` returns the rounds of the server with a name.
fn judge_targets<'a>(turns_of: impl Fn(&str) -> Option<&'a [Turn]>) -> Vec<TargetResult> {
    let judge = |target: &TargetSpec| {
        let (name, _, value) = FIGURES[target.figure];
        let is_added = target.figure == ADDED;
        let ratio = |((alone, own), other): ((&Turn, &Turn), &Turn)| {
            let base = if is_added { value(alone)? } else { 0.0 };
            Some((value(own)? - base) / (value(other)? - base))
        };
        let rounds = turns_of(ENGINE)?.iter().zip(turns_of(TOKENWAY)?);
        let ratios = rounds.zip(turns_of(target.other)?).map(ratio);
        let spread = Spread::from_rounds(ratios)?;
        let added = if is_added { " added" } else { "" };
        let name = format!("{name}{added}, of {}", target.other);
        let TargetSpec { bound, limit, .. } = *target;
        Some(TargetResult::new(name, spread, bound, limit, "×"))
    };
    TARGETS.iter().filter_map(judge).collect()
}

fn write_targets(targets: &[TargetResult], out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "\n| Tokenway's share | ratio | target | reached |\n|---|---|---|---|"
    )?;
    for target in targets {
        let TargetResult {
            target: name,
            spread,
            limit,
            bound,
            unit,
            pass,
            ..
        } = target;
        let ratio = format_spread(Some(*spread), 2);
        let reached = if *pass { "yes" } else { "**no**" };
        writeln!(
            out,
            "| {name} | {ratio} | {} {limit} {unit} | {reached} |",
            bound.sign()
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns rounds with these latencies, and numbers of requests per second with long prompts.
    fn rounds(values: [(f64, f64); 3]) -> Vec<Turn> {
        let turn = |(one_way_p50_us, requests_per_second)| {
            let mut turn = Turn::default();
            turn[0].one_way_p50_us = one_way_p50_us;
            turn[2].rates.requests_per_second = requests_per_second;
            turn
        };
        values.map(turn).to_vec()
    }

    /// Returns the name, value and verdict of each target.
    fn judge_all(servers: &[(&str, Vec<Turn>)]) -> Vec<(String, f64, bool)> {
        let turns_of = |name: &str| {
            let (_, turns) = servers.iter().find(|(server, _)| *server == name)?;
            Some(turns.as_slice())
        };
        let targets = judge_targets(turns_of).into_iter();
        let of = |target: TargetResult| (target.target, target.value, target.pass);
        targets.map(of).collect()
    }

    #[test]
    fn a_ratio_is_taken_within_each_round_and_a_latency_without_that_of_the_engine() {
        let servers = [
            (
                ENGINE,
                rounds([(10.0, 500.0), (20.0, 500.0), (10.0, 500.0)]),
            ),
            (
                TOKENWAY,
                rounds([(15.0, 90.0), (30.0, 45.0), (12.0, 150.0)]),
            ),
            ("SMG", rounds([(20.0, 100.0), (40.0, 50.0), (20.0, 100.0)])),
        ];
        let expected = [
            ("one-way p50 µs added, of SMG".to_owned(), 0.5, true),
            ("requests/s, 470 KB prompts, of SMG".to_owned(), 0.9, false),
        ];
        assert_eq!(judge_all(&servers), expected);
    }

    #[test]
    fn a_figure_that_is_unknown_in_one_round_is_not_judged() {
        let mut servers = [ENGINE, TOKENWAY].map(|name| (name, rounds([(0.0, 0.0); 3])));
        for (_, turns) in &mut servers {
            for turn in turns {
                turn[3].rates.requests_per_second = 2.0;
            }
        }
        let name = "requests/s, tokenized, of engine alone".to_owned();
        assert_eq!(judge_all(&servers), [(name, 1.0, true)]);
        servers[1].1[2][3].rates.requests_per_second = f64::NAN;
        assert_eq!(judge_all(&servers), []);
    }
}
