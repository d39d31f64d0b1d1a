//! The subcommand `survive`: runs streams on a server while its worker processes are killed or suspended at random
//! times. Every stream is compared, token by token, with the same stream on undisturbed workers.

use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, interval, sleep_until, timeout};

mod faults;
mod server;
mod stream;
mod tally;
mod upstreams;

use faults::FaultInjector;
use server::Server;
use stream::{StreamPlan, Texts};
use tally::Tally;

use crate::arguments::parse_duration_ms;
use crate::progress;
use crate::stream::Format;
use crate::{CommandResult, Verdict};

/// Time within which the last streams must end after the last fault.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(120);

/// Run streams on worker processes that are killed (SIGKILL) and stopped (SIGSTOP) at random times, and compare each
/// stream with an undisturbed stream.
///
/// The server is `tokenway serve --isolation process`, from the directory of this program. Half of the streams use
/// gRPC, half use HTTP with NDJSON. A stream that has ended starts again until the time is over. Before the first
/// fault, each prompt is completed once. Each stream must repeat that completion, token by token.
///
/// Exit codes: 0 if no token was lost, repeated or different; 1 if one was, or a stream failed; 2 if the arguments are
/// wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Time during which workers are killed and stopped, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Number of concurrent streams
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    streams: u16,
    /// Number of tokens of each stream
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Run the streams through a gateway in front of three scripted engines that fail most requests, instead of workers
    #[arg(long, conflicts_with_all = ["workers", "least_ms", "most_ms", "model_path"])]
    upstreams: bool,
    /// Number of worker processes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Shortest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "500", value_parser = parse_duration_ms)]
    least_ms: Duration,
    /// Longest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "3000", value_parser = parse_duration_ms)]
    most_ms: Duration,
    /// Time between two tokens of the test runner, in milliseconds
    #[arg(long, value_name = "MS", default_value = "10", value_parser = parse_duration_ms, conflicts_with = "model_path")]
    interval_ms: Duration,
    /// GGUF model to use instead of the test runner, with one thread per worker
    #[arg(long, value_name = "FILE")]
    model_path: Option<PathBuf>,
    /// Seed of the random numbers; the same seed gives the same faults [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    if options.upstreams {
        return upstreams::run(options, out).await;
    }
    let tally = LocalSet::new().run_until(run_with_faults(options)).await?;
    tally.write(out)?;
    Ok(Verdict::from_report(tally.has_passed()))
}

async fn run_with_faults(options: &Options) -> anyhow::Result<Tally> {
    let seed = options.seed.unwrap_or_else(rand::random);
    let server = Rc::new(Server::start(options).await?);
    let expected = complete_undisturbed(&server, options).await?;
    let tally = Tally::new(options.workers, seed);
    let end = Instant::now() + Duration::from_secs(options.seconds.into());
    let mut streams = JoinSet::new();
    for number in 0..options.streams {
        let planned = StreamPlan::for_number(number, options.tokens);
        let (server, tally) = (Rc::clone(&server), tally.clone());
        let expected = Rc::clone(&expected[planned.prompt_index()]);
        streams.spawn_local(async move {
            while Instant::now() < end {
                tally.record_end(planned.run(&server, Some(&expected), &tally).await);
            }
        });
    }
    let injector = FaultInjector {
        random: StdRng::seed_from_u64(seed),
        pause: options.least_ms..options.most_ms,
    };
    let bar = progress::create_bar(options.seconds.into(), "killing  {bar:40} {pos}/{len} s");
    let watching = async {
        let mut seconds = interval(Duration::from_secs(1));
        loop {
            seconds.tick().await;
            bar.inc(1);
            tally.sample_memory(&server);
        }
    };
    tokio::select! {
        () = injector.run(&server, &tally) => {}
        () = watching => {}
        () = sleep_until(end) => {}
    }
    bar.finish_and_clear();
    if timeout(DRAIN_TIMEOUT, streams.join_all()).await.is_err() {
        tally.record_fault("some streams did not end after the last fault".to_owned());
    }
    tally.sample_memory(&server);
    tally.set_metrics(server.fetch_metrics().await?);
    server.kill()?;
    Ok(tally)
}

/// Completes each prompt on undisturbed workers. Returns the expected texts of each prompt.
async fn complete_undisturbed(
    server: &Server,
    options: &Options,
) -> anyhow::Result<Vec<Rc<Texts>>> {
    let uncounted = Tally::new(options.workers, 0);
    let mut all = Vec::new();
    for prompt in 0..stream::PROMPT_COUNT {
        let planned = StreamPlan {
            format: Format::Grpc,
            prompt,
            tokens: options.tokens,
        };
        let texts = planned.run(server, None, &uncounted).await;
        all.push(Rc::new(
            texts.context("a stream failed before the first fault")?,
        ));
    }
    Ok(all)
}
