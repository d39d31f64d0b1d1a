//! The subcommand `soak`: runs good and bad clients against a server for a while, and checks that the server releases
//! all resources afterwards.
//!
//! A warm-up with the same clients comes first, so that the server has made all its lasting allocations. After the
//! warm-up all clients leave. The resources that the server holds then are the resources that it may still hold at the
//! end of the run.

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
mod chats;
mod checked;
mod client;
mod outcome;
mod page;
mod readers;
mod sample;
mod table;
mod tally;
mod verdict;

use behavior::Load;
use client::{Crowd, Server, SharedState};
use outcome::SoakOutcome;
use sample::{Sample, Sampler};
use tally::Tally;

use crate::arguments::{ServerUrl, parse_duration_ms, parse_grpc_address};
use crate::fault::Fault;
use crate::progress;
use crate::report::ReportFiles;
use crate::serve::{self, Role};
use crate::server::ServerProcess;
use crate::{CommandResult, Verdict};

/// Peer timeout of the server that the run starts, and default peer timeout of any other server.
const OWN_PEER_TIMEOUT: Duration = Duration::from_secs(1);
const DEFAULT_PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// The warm-up takes one part in this many of the run, but not longer than `LONGEST_WARM_UP`.
const WARM_UP_DIVISOR: u32 = 6;
const LONGEST_WARM_UP: Duration = Duration::from_secs(60);
/// Number of samples in a short run, and time between two samples in a long run.
const SHORT_RUN_SAMPLES: u32 = 50;
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Number of samples of the idle server. The sample with the fewest descriptors counts.
const IDLE_SAMPLES: u32 = 6;
/// Number of rows in the printed table.
const TABLE_ROWS: u32 = 20;
/// Time, in addition to four peer timeouts, within which the server must release all resources.
const RELEASE_GRACE: Duration = Duration::from_secs(10);
/// Number of requests that may wait for a slot, as in Tokenway by default.
const QUEUE_DEPTH: usize = 1_024;
const MIB: u64 = 1024 * 1024;

/// Put a mixed load on a server for a while, and check that the server releases all resources.
///
/// The load consists of complete streams through both APIs, with a check of every token; unary requests; streams that
/// clients leave with FIN, RST or RST_STREAM; readers that stop reading; stalled windows; bad requests, garbage and
/// silence. With `--load chats`, clients hold chats with a real model instead. A sixth of the time, at most a minute,
/// is a warm-up; then all clients leave, and the server's resources are recorded; then the load continues for the
/// rest of the time, and all leave again.
///
/// Memory is judged under load: the median of the last quarter of the samples may exceed the median of the first
/// quarter by --rss-allowance-mib, because allocators keep the memory of a peak. After the load there must be no more
/// descriptors and threads than before it, and no slot, request or connection may be in use.
///
/// Exit codes: 0 if nothing leaked and every answer was right; 1 if not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Duration of the run, in minutes; fractions are allowed
    #[arg(long, value_name = "N", default_value = "10", value_parser = parse_minutes)]
    minutes: Duration,
    /// Seed of the random numbers; the same seed gives the same clients [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Number of concurrent clients
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// Time between two tokens of a stream on the server that the run starts, in milliseconds
    #[arg(long, value_name = "MS", default_value = "1", value_parser = parse_duration_ms, conflicts_with = "http")]
    interval_ms: Duration,
    /// Time after which the server gives up an unresponsive peer, in milliseconds; the server given by --http must use
    /// the same time [default: 1000, or 10000 with --http]
    #[arg(long, value_name = "MS", value_parser = parse_duration_ms)]
    peer_timeout_ms: Option<Duration>,
    /// Memory by which the server may grow under load, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8)]
    rss_allowance_mib: u64,
    /// Clients of the run. Chats need a server with a real model that computes with --threads 1, given by --http
    #[arg(
        long,
        value_name = "LOAD",
        default_value = "mixed",
        requires_if("chats", "http")
    )]
    load: Load,
    /// URL of a running server without other clients; it runs the test runner, or a model with --load chats [default:
    /// start a server]
    #[arg(long, value_name = "URL", requires_all = ["grpc", "pid"])]
    http: Option<ServerUrl>,
    /// gRPC API of the server given by --http, as `host:port`
    #[arg(long, value_name = "ADDR", value_parser = parse_grpc_address, requires = "http")]
    grpc: Option<ServerUrl>,
    /// Process id of the server given by --http; it must run on this machine as the same user
    #[arg(long, value_name = "PID", requires = "http")]
    pid: Option<u32>,
    #[command(flatten)]
    files: ReportFiles,
}

struct Soak<'a> {
    options: &'a Options,
    seed: u64,
    shared: SharedState,
    sampler: Sampler,
    bar: ProgressBar,
}

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let soak = soak_and_report(options, out);
    LocalSet::new().run_until(soak).await
}

async fn soak_and_report(options: &Options, out: &mut dyn Write) -> CommandResult {
    // The server ends when this is dropped.
    let mut own = None;
    let (http, grpc, process) = match (&options.http, &options.grpc, options.pid) {
        (Some(http), Some(grpc), Some(process)) => (http.clone(), grpc.clone(), process),
        _ => {
            let own = own.insert(start_own_server(options).await?);
            (own.http_url()?, own.grpc_url()?, own.process_id()?)
        }
    };
    let server = Server {
        http,
        grpc,
        peer_timeout: options.peer_timeout(),
    };
    let outcome = Soak::new(options, server, process).run(out).await?;
    writeln!(out, "\n{}\n", table::behavior_totals(&outcome.tally))?;
    for line in outcome.verdict_lines() {
        writeln!(out, "{line}")?;
    }
    out.flush()?;
    let page = || page::page_values(&outcome);
    options.files.write(&outcome, "soak.html", page)?;
    Ok(Verdict::from_report(outcome.has_passed()))
}

async fn start_own_server(options: &Options) -> anyhow::Result<ServerProcess> {
    // Fewer slots than clients, so that some of them wait.
    let slots = usize::from(options.clients) * 3 / 4 + 1;
    let start = serve::Options {
        peer_timeout: options.peer_timeout(),
        ..serve::Options::new(Role::Product, options.interval_ms, slots, QUEUE_DEPTH)
    };
    ServerProcess::start(&start).await
}

impl Options {
    fn peer_timeout(&self) -> Duration {
        let default = match self.http {
            None => OWN_PEER_TIMEOUT,
            Some(_) => DEFAULT_PEER_TIMEOUT,
        };
        self.peer_timeout_ms.unwrap_or(default)
    }
}

impl<'a> Soak<'a> {
    fn new(options: &'a Options, server: Server, process: u32) -> Self {
        let tally = Rc::new(RefCell::new(Tally::new(options.load)));
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
            shared: SharedState {
                server: Rc::new(server),
                tally,
            },
            bar: progress::create_bar(options.minutes.as_secs(), template),
        }
    }

    async fn run(self, out: &mut dyn Write) -> anyhow::Result<SoakOutcome> {
        let (server, clients) = (&self.shared.server, usize::from(self.options.clients));
        writeln!(
            out,
            "{clients} clients on {} and {} for {:.1} min, --seed {}\n\n{}",
            server.http,
            server.grpc,
            self.options.minutes.as_secs_f64() / 60.0,
            self.seed,
            table::sample_head()
        )?;
        let mut random = StdRng::seed_from_u64(self.seed);
        let end = Instant::now() + self.options.minutes;
        let load = self.options.load;
        let crowd = Crowd::start_clients(&self.shared, load, clients, &mut random);
        self.bar.set_message("warm-up");
        sleep((self.options.minutes / WARM_UP_DIVISOR).min(LONGEST_WARM_UP)).await;
        crowd.stop_clients().await;
        let before = self.sample_idle().await?;
        self.write_row(&before, out)?;

        let crowd = Crowd::start_clients(&self.shared, load, clients, &mut random);
        self.bar.set_message("load");
        let steady = self.sample_until(end, out).await?;
        crowd.stop_clients().await;
        self.bar.set_message("all clients have left");
        let has_released = |now: &Sample| verdict::has_released(&before, now);
        let releasing = self
            .sampler
            .wait_for_sample(self.release_timeout(), has_released);
        let after = releasing.await?;
        self.write_row(&after, out)?;
        self.bar.finish_and_clear();
        let allowance = self.options.rss_allowance_mib.saturating_mul(MIB);
        Ok(SoakOutcome {
            format: outcome::JSON_FORMAT_VERSION,
            seed: self.seed,
            tally: self.shared.tally.replace(Tally::new(load)),
            leaks: verdict::find_leaks(&before, &steady, &after, allowance),
            before,
            steady,
            after,
        })
    }

    /// Takes a sample of the server without clients. A socket may still be closing, so several samples are taken, and
    /// the lowest number of descriptors counts.
    async fn sample_idle(&self) -> Result<Sample, Fault> {
        let sample = || {
            self.sampler
                .wait_for_sample(self.release_timeout(), Sample::is_idle)
        };
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

    /// Takes samples of the server until `end`, and prints some of them as rows.
    async fn sample_until(&self, end: Instant, out: &mut dyn Write) -> anyhow::Result<Vec<Sample>> {
        let interval = (self.options.minutes / SHORT_RUN_SAMPLES).min(SAMPLE_INTERVAL);
        let between_rows = self.options.minutes / TABLE_ROWS;
        let (mut samples, mut next_row) = (Vec::new(), Instant::now());
        while Instant::now() < end {
            sleep_until((Instant::now() + interval).min(end)).await;
            match self.sampler.sample().await {
                Ok(sample) => samples.push(sample),
                Err(gone @ Fault::Process(_)) => return Err(gone.into()),
                Err(fault) => {
                    let fault = format!("cannot read the metrics: {fault}");
                    self.shared.tally.borrow_mut().record_fault(fault);
                }
            }
            let elapsed = self.sampler.start.elapsed();
            self.bar.set_position(elapsed.as_secs());
            if let Some(last) = samples.last()
                && Instant::now() >= next_row
            {
                next_row += between_rows;
                self.write_row(last, out)?;
            }
        }
        Ok(samples)
    }

    fn write_row(&self, sample: &Sample, out: &mut dyn Write) -> io::Result<()> {
        self.bar.suspend(|| {
            writeln!(out, "{}", table::sample_row(sample))?;
            out.flush()
        })
    }

    fn release_timeout(&self) -> Duration {
        self.shared.server.peer_timeout * 4 + RELEASE_GRACE
    }
}

fn parse_minutes(text: &str) -> Result<Duration, String> {
    let minutes: Option<f64> = text.parse().ok();
    minutes
        .and_then(|minutes| Duration::try_from_secs_f64(minutes * 60.0).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "it must be a number of minutes above 0".to_owned())
}
