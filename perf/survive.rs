//! The subcommand `survive`: streams on a server whose workers are processes, which are killed and stopped at
//! random moments. Every stream is compared token by token with the same one undisturbed.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until};

mod fault;
mod server;
mod stream;
mod tally;

use fault::Killer;
use server::{Server, StartError};
use stream::{Asked, Expected};
use tally::Tally;

use crate::arguments::duration_ms;

/// How long the last streams may take to end, when nothing is killed any more.
const LAST: Duration = Duration::from_secs(120);

/// Run streams on worker processes that are killed (SIGKILL) and stopped (SIGSTOP) at random moments, and compare
/// each with an undisturbed one.
///
/// The server is `tokenway serve --isolation process`, of the executable beside this one. Half of the streams come
/// by gRPC, half by HTTP as NDJSON; each is begun anew when it has ended, until the time is over. Before anything is
/// killed every prompt is completed once: that is what each stream must be, token by token.
///
/// Exit codes: 0 when no token was lost, repeated or another; 1 when one was, or a stream failed; 2 when the arguments
/// are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// How long workers are killed, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// How many streams run at once
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    streams: u16,
    /// How many tokens each has
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// How many worker processes there are
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// The shortest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "500", value_parser = duration_ms)]
    least_ms: Duration,
    /// The longest time between two faults, in milliseconds
    #[arg(long, value_name = "MS", default_value = "3000", value_parser = duration_ms)]
    most_ms: Duration,
    /// The interval of the test runner's tokens, in milliseconds
    #[arg(long, value_name = "MS", default_value = "10", value_parser = duration_ms, conflicts_with = "model_path")]
    interval_ms: Duration,
    /// A GGUF model, on one thread a worker, instead of the test runner
    #[arg(long, value_name = "FILE")]
    model_path: Option<PathBuf>,
    /// What all chance comes from: the same seed has the same faults [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Runs it, and prints what came of it.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let survived = runtime
        .map_err(StartError::from)
        .and_then(|runtime| LocalSet::new().block_on(&runtime, survive(options)));
    let told = match survived {
        Ok(tally) => tally.write(out).map(|()| {
            if tally.is_good() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }),
        Err(error) => writeln!(err, "error: {error}").map(|()| ExitCode::FAILURE),
    };
    told.unwrap_or(ExitCode::FAILURE)
}

async fn survive(options: &Options) -> Result<Tally, StartError> {
    let seed = options.seed.unwrap_or_else(rand::random);
    let server = Rc::new(Server::start(options).await?);
    let expected = expected(&server, options).await?;
    let tally = Tally::new(options.workers, seed);
    let end = Instant::now() + Duration::from_secs(options.seconds.into());
    let mut streams = Vec::new();
    for number in 0..options.streams {
        let asked = Asked::of(number, options.tokens);
        let (server, tally) = (Rc::clone(&server), tally.clone());
        let expected = expected[asked.prompt()].clone();
        streams.push(tokio::task::spawn_local(async move {
            while Instant::now() < end {
                tally.ended(stream::run(&server, &asked, Some(&expected), &tally).await);
            }
        }));
    }
    let killer = Killer {
        random: StdRng::seed_from_u64(seed),
        pause: options.least_ms..options.most_ms,
    };
    let bar = progress(options.seconds);
    let watching = async {
        let mut looks = tokio::time::interval(Duration::from_secs(1));
        loop {
            looks.tick().await;
            bar.inc(1);
            tally.look(&server);
        }
    };
    tokio::select! {
        () = killer.kill_on(&server, &tally) => {}
        () = watching => {}
        () = sleep_until(end) => {}
    }
    bar.finish_and_clear();
    let all = async {
        for stream in streams {
            // A stream that panics is a fault of this program.
            stream.await.expect("a stream does not panic");
        }
    };
    if tokio::time::timeout(LAST, all).await.is_err() {
        tally.hangs();
    }
    tally.look(&server);
    tally.metrics(&server.metrics().await?);
    server.stop()?;
    Ok(tally)
}

/// What each prompt's completion is when nothing is killed.
async fn expected(server: &Server, options: &Options) -> Result<Vec<Rc<Expected>>, StartError> {
    let undisturbed = Tally::new(options.workers, 0);
    let mut all = Vec::new();
    for prompt in 0..stream::PROMPTS {
        let asked = Asked::of_prompt(prompt, options.tokens);
        let whole = stream::run(server, &asked, None, &undisturbed).await;
        let tokens = whole.map_err(|fault| StartError::Undisturbed(fault.to_string()))?;
        all.push(Rc::new(tokens));
    }
    Ok(all)
}

fn progress(seconds: u32) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(seconds.into()), target);
    let style = ProgressStyle::with_template("killing  {bar:40} {pos}/{len} s");
    bar.with_style(style.expect("the template is valid"))
}
