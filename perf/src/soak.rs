//! The subcommand `soak`: a mixed load of good and bad clients for as long as requested, and a check that
//! the server releases everything afterwards.
//!
//! First the clients connect for a warm-up, after which the server has allocated everything that it keeps.
//! They leave; the resources that it holds then are those that it may hold at the end.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, sleep_until};

mod bad;
mod behavior;
mod checked;
mod client;
mod outcome;
mod page;
mod readers;
mod sample;
mod table;
mod tally;
mod verdict;

use client::{Crowd, Server, Shared};
use outcome::SoakOutcome;
use sample::{Sample, Sampler};
use tally::Tally;

use crate::arguments::{ServerUrl, duration_ms, grpc_address};
use crate::fault::Fault;
use crate::progress;
use crate::report::Files;
use crate::serve::{self, Role};
use crate::server::OwnServer;
use crate::{Outcome, Verdict};

/// Peer timeout of the run's own server, and of a server with the defaults.
const OWN_PEER_TIMEOUT: Duration = Duration::from_secs(1);
const DEFAULT_PEER_TIMEOUT: Duration = Duration::from_secs(10);

/// Share of the run that is the warm-up, and its upper bound.
const WARM_UP_SHARE: u32 = 6;
const LONGEST_WARM_UP: Duration = Duration::from_secs(60);

/// Samples in a short run, and the interval of samples in a long one.
const SAMPLES: u32 = 50;
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Samples of the idle server, of which the lowest number of descriptors counts.
const IDLE_SAMPLES: u32 = 6;

/// Rows of the printed table.
const ROWS: u32 = 20;

/// Time in which the server must release everything, in addition to four times its peer timeout.
const RELEASE_GRACE: Duration = Duration::from_secs(10);

/// Requests that may wait for a slot, as in the product by default.
const QUEUE: usize = 1_024;

const MIB: u64 = 1024 * 1024;

/// Put a mixed load on a server for a while, and check that it releases everything.
///
/// Complete streams through both APIs, every token of which is checked; unary requests; streams that their
/// clients leave with FIN, RST and RST_STREAM; readers that stop reading; stalled windows; bad requests,
/// garbage and silence. A sixth of the time, at most a minute, is a warm-up; then all clients leave, and
/// the server's resources are recorded; then the load continues for the rest of the time, and all leave
/// again.
///
/// Memory is judged under load: the median of the last quarter of its samples may exceed the median of the
/// first by --rss-allowance-mib, because allocators keep the memory of a peak. There must be no more
/// descriptors and threads after the load than before it, and no slot, request or connection may be left.
///
/// Exit codes: 0 if nothing leaked and every answer was right; 1 if not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Length of the run in minutes; fractions are allowed
    #[arg(long, value_name = "N", default_value = "10", value_parser = minutes)]
    minutes: Duration,
    /// Seed of the random numbers: the same seed has the same clients [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Clients at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// Interval of the tokens of the run's own server, in milliseconds
    #[arg(long, value_name = "MS", default_value = "1", value_parser = duration_ms, conflicts_with = "http")]
    interval_ms: Duration,
    /// Time until the server gives up an unresponsive peer, in milliseconds; a running server must have been
    /// started with the same time [default: 1000, or 10000 with --http]
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    peer_timeout_ms: Option<Duration>,
    /// Limit of the memory that is added under load, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8)]
    rss_allowance_mib: u64,
    /// HTTP API of a running server with the test runner and no other clients
    #[arg(long, value_name = "URL", requires_all = ["grpc", "pid"])]
    http: Option<ServerUrl>,
    /// Its gRPC API, as `host:port`
    #[arg(long, value_name = "ADDR", value_parser = grpc_address, requires = "http")]
    grpc: Option<ServerUrl>,
    /// Its process, on this machine and of this user
    #[arg(long, value_name = "PID", requires = "http")]
    pid: Option<u32>,
    #[command(flatten)]
    files: Files,
}

/// A run in progress.
struct Soak<'a> {
    options: &'a Options,
    seed: u64,
    shared: Shared,
    sampler: Sampler,
    bar: ProgressBar,
}

/// Soaks a server, and prints the table and the verdict.
pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let soak = soak_and_report(options, out);
    LocalSet::new().run_until(soak).await
}

async fn soak_and_report(options: &Options, out: &mut dyn Write) -> Outcome {
    // The server ends when this is dropped.
    let mut own = None;
    let (http, grpc, process) = match (&options.http, &options.grpc, options.pid) {
        (Some(http), Some(grpc), Some(process)) => (http.clone(), grpc.clone(), process),
        _ => {
            let own = own.insert(own_server(options).await?);
            (own.http()?, own.grpc()?, own.id()?)
        }
    };
    let server = Server {
        http,
        grpc,
        peer_timeout: options.peer_timeout(),
    };
    let outcome = Soak::new(options, server, process).run(out).await?;
    writeln!(out, "\n{}\n", table::totals(&outcome.tally))?;
    for line in outcome.verdict() {
        writeln!(out, "{line}")?;
    }
    out.flush()?;
    let page = || page::values(&outcome);
    options.files.write(&outcome, "soak.html", page)?;
    Ok(Verdict::reported(outcome.is_good()))
}

async fn own_server(options: &Options) -> anyhow::Result<OwnServer> {
    // Fewer slots than clients, so that some of them wait.
    let slots = usize::from(options.clients) * 3 / 4 + 1;
    let start = serve::Options {
        peer_timeout: options.peer_timeout(),
        ..serve::Options::new(Role::Product, options.interval_ms, slots, QUEUE)
    };
    OwnServer::start(&start).await
}

impl Options {
    fn peer_timeout(&self) -> Duration {
        let is_own = self.http.is_none();
        let default = if is_own {
            OWN_PEER_TIMEOUT
        } else {
            DEFAULT_PEER_TIMEOUT
        };
        self.peer_timeout_ms.unwrap_or(default)
    }
}

impl<'a> Soak<'a> {
    fn new(options: &'a Options, server: Server, process: u32) -> Self {
        let tally = Rc::new(RefCell::new(Tally::default()));
        let template = "{bar:30} {elapsed} of {len} s, {msg}";
        Self {
            options,
            seed: options.seed.unwrap_or_else(|| rand::random::<u32>().into()),
            sampler: Sampler {
                http: server.http.clone(),
                process,
                start: Instant::now(),
                tally: Rc::clone(&tally),
            },
            shared: Shared {
                server: Rc::new(server),
                tally,
            },
            bar: progress::bar(options.minutes.as_secs(), template),
        }
    }

    async fn run(self, out: &mut dyn Write) -> anyhow::Result<SoakOutcome> {
        let (server, clients) = (&self.shared.server, usize::from(self.options.clients));
        writeln!(
            out,
            "{clients} clients at {} and {} for {:.1} min, --seed {}\n\n{}",
            server.http,
            server.grpc,
            self.options.minutes.as_secs_f64() / 60.0,
            self.seed,
            table::head()
        )?;
        let mut random = StdRng::seed_from_u64(self.seed);
        let end = Instant::now() + self.options.minutes;
        let crowd = Crowd::enter(&self.shared, clients, &mut random);
        self.bar.set_message("warm-up");
        sleep((self.options.minutes / WARM_UP_SHARE).min(LONGEST_WARM_UP)).await;
        crowd.leave().await;
        let before = self.idle().await?;
        self.row(&before, out)?;

        let crowd = Crowd::enter(&self.shared, clients, &mut random);
        self.bar.set_message("load");
        let steady = self.sample_until(end, out).await?;
        crowd.leave().await;
        self.bar.set_message("all clients have left");
        let has_released = |now: &Sample| verdict::has_released(&before, now);
        let releasing = self.sampler.wait(self.release_timeout(), has_released);
        let after = releasing.await?;
        self.row(&after, out)?;
        self.bar.finish_and_clear();
        let allowance = self.options.rss_allowance_mib.saturating_mul(MIB);
        Ok(SoakOutcome {
            format: outcome::FORMAT,
            seed: self.seed,
            tally: self.shared.tally.take(),
            leaks: verdict::leaks(&before, &steady, &after, allowance),
            before,
            steady,
            after,
        })
    }

    /// Samples the server without clients. A socket may still be closing, so the lowest number of
    /// descriptors of several samples counts.
    async fn idle(&self) -> Result<Sample, Fault> {
        let sample = || self.sampler.wait(self.release_timeout(), Sample::is_idle);
        let mut idle = sample().await?;
        for _ in 1..IDLE_SAMPLES {
            let next = sample().await?;
            idle = Sample {
                descriptors: idle.descriptors.min(next.descriptors),
                ..next
            };
        }
        Ok(idle)
    }

    /// Samples the server until `end`, and prints a row now and then.
    async fn sample_until(&self, end: Instant, out: &mut dyn Write) -> anyhow::Result<Vec<Sample>> {
        let interval = (self.options.minutes / SAMPLES).min(SAMPLE_INTERVAL);
        let between_rows = self.options.minutes / ROWS;
        let (mut samples, mut next_row) = (Vec::new(), Instant::now());
        while Instant::now() < end {
            sleep_until((Instant::now() + interval).min(end)).await;
            match self.sampler.sample().await {
                Ok(sample) => samples.push(sample),
                Err(gone @ Fault::Process(_)) => return Err(gone.into()),
                Err(fault) => {
                    let fault = format!("the metrics: {fault}");
                    self.shared.tally.borrow_mut().fault(fault);
                }
            }
            let elapsed = self.sampler.start.elapsed();
            self.bar.set_position(elapsed.as_secs());
            if let Some(last) = samples.last()
                && Instant::now() >= next_row
            {
                next_row += between_rows;
                self.row(last, out)?;
            }
        }
        Ok(samples)
    }

    fn row(&self, sample: &Sample, out: &mut dyn Write) -> io::Result<()> {
        self.bar.suspend(|| {
            writeln!(out, "{}", table::row(sample))?;
            out.flush()
        })
    }

    fn release_timeout(&self) -> Duration {
        self.shared.server.peer_timeout * 4 + RELEASE_GRACE
    }
}

/// Parses a time in minutes, which may have a fraction.
fn minutes(text: &str) -> Result<Duration, String> {
    let minutes: Option<f64> = text.parse().ok();
    minutes
        .and_then(|minutes| Duration::try_from_secs_f64(minutes * 60.0).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "it must be a number of minutes above 0".to_owned())
}
