//! The subcommand `survive`: streams on a server whose worker processes are killed and stopped at random
//! moments. Every stream is compared token by token with the same stream on undisturbed workers.

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

use faults::FaultInjector;
use server::Server;
use stream::{Planned, Texts};
use tally::Tally;

use crate::arguments::duration_ms;
use crate::progress;
use crate::stream::Format;
use crate::{Outcome, Verdict};

/// Time in which the last streams must end, after the last fault.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(120);

/// Run streams on worker processes that are killed (SIGKILL) and stopped (SIGSTOP) at random moments, and
/// compare each with an undisturbed one.
///
/// The server is `tokenway serve --isolation process`, of the executable beside this one. Half of the
/// streams use gRPC, half HTTP with NDJSON; each starts again when it has ended, until the time is over.
/// Before the first fault every prompt is completed once: each stream must repeat that completion, token
/// by token.
///
/// Exit codes: 0 if no token was lost, repeated or different; 1 if one was, or a stream failed; 2 if the
/// arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Time during which workers are killed, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Streams at once
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    streams: u16,
    /// Tokens of each stream
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Number of worker processes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Shortest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "500", value_parser = duration_ms)]
    least_ms: Duration,
    /// Longest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "3000", value_parser = duration_ms)]
    most_ms: Duration,
    /// Interval of the test runner's tokens, in milliseconds
    #[arg(long, value_name = "MS", default_value = "10", value_parser = duration_ms, conflicts_with = "model_path")]
    interval_ms: Duration,
    /// A GGUF model, on one thread for each worker, instead of the test runner
    #[arg(long, value_name = "FILE")]
    model_path: Option<PathBuf>,
    /// Seed of the random numbers: the same seed has the same faults [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Runs the streams, and prints the counts.
pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let tally = LocalSet::new().run_until(survive(options)).await?;
    tally.write(out)?;
    Ok(Verdict::reported(tally.is_good()))
}

async fn survive(options: &Options) -> anyhow::Result<Tally> {
    let seed = options.seed.unwrap_or_else(rand::random);
    let server = Rc::new(Server::start(options).await?);
    let expected = undisturbed(&server, options).await?;
    let tally = Tally::new(options.workers, seed);
    let end = Instant::now() + Duration::from_secs(options.seconds.into());
    let mut streams = JoinSet::new();
    for number in 0..options.streams {
        let planned = Planned::of(number, options.tokens);
        let (server, tally) = (Rc::clone(&server), tally.clone());
        let expected = Rc::clone(&expected[planned.prompt()]);
        streams.spawn_local(async move {
            while Instant::now() < end {
                tally.ended(planned.run(&server, Some(&expected), &tally).await);
            }
        });
    }
    let injector = FaultInjector {
        random: StdRng::seed_from_u64(seed),
        pause: options.least_ms..options.most_ms,
    };
    let bar = progress::bar(options.seconds.into(), "killing  {bar:40} {pos}/{len} s");
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
        tally.fault("streams hang".to_owned());
    }
    tally.sample_memory(&server);
    tally.metrics(server.metrics().await?);
    server.stop()?;
    Ok(tally)
}

/// Completes each prompt without faults.
async fn undisturbed(server: &Server, options: &Options) -> anyhow::Result<Vec<Rc<Texts>>> {
    let uncounted = Tally::new(options.workers, 0);
    let mut all = Vec::new();
    for prompt in 0..stream::PROMPTS {
        let planned = Planned {
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
