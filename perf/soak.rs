//! The subcommand `soak`: a mixed load, well-behaved and not, for as long as one likes, and whether the
//! server gives everything back when it is over.
//!
//! First the clients come for a warm-up, after which the server has made all that it makes once. They
//! leave; what it holds then is what it may hold at the end.

use std::cell::RefCell;
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
use tokio::time::{Instant, sleep, sleep_until};

mod bad;
mod charts;
mod client;
mod connection;
mod html;
mod json;
mod kind;
mod outcome;
mod readers;
mod sample;
mod stream;
mod table;
mod tally;
mod tokens;
mod verdict;

use client::{Crowd, Doors, Place};
use outcome::Outcome;
use sample::{Sample, Watched};
use tally::Tally;
use verdict::Evidence;

use crate::arguments::{ServerUrl, duration_ms, grpc_address};
use crate::serve::Role;
use crate::server::{OwnServer, ServerError, Start};

/// How patient the run's own server is, and one that runs with the defaults.
const OWN_PATIENCE: Duration = Duration::from_secs(1);
const DEFAULT_PATIENCE: Duration = Duration::from_secs(10);

/// Which part of the time is for the warm-up, and how long that is at most.
const WARM_UP_PART: u32 = 6;
const WARM_UP: Duration = Duration::from_secs(60);

/// How often the server is looked at: in a short run more often.
const LOOKS: u32 = 50;
const LOOK: Duration = Duration::from_secs(1);

/// How many rows the table over time has.
const ROWS: u32 = 20;

/// How long the server may take to give everything back, beyond four times its patience.
const GIVE_BACK: Duration = Duration::from_secs(10);

const MIB: u64 = 1024 * 1024;

/// Put a mixed load on a server for a while, and see whether it gives everything back.
///
/// Whole streams on both doors, every token of which is checked; unary requests; streams left in the
/// middle by FIN, RST and RST_STREAM; readers that stand still; stalled windows; bad requests, garbage
/// and silence. A sixth of the time, at most a minute, is a warm-up; then all clients leave, and what
/// the server holds is noted; then the load goes on for the rest of the time, and all leave again.
///
/// Memory is judged under the load: the median of the last quarter of the looks at it may be above the
/// median of the first by --rss-allowance-mib, for allocators keep what a peak once needed. Of
/// descriptors and threads there must be no more after the load than before it, and no slot, request or
/// connection may be left.
///
/// Exit codes: 0 when nothing leaked and every answer was right; 1 when not; 2 when the arguments are
/// wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// How long, in minutes; fractions are allowed
    #[arg(long, value_name = "N", default_value = "10", value_parser = minutes)]
    minutes: Duration,
    /// What all chance comes from: the same seed does the same things [default: drawn]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many clients there are at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// The interval of the own server's tokens, in milliseconds
    #[arg(long, value_name = "MS", default_value = "1", value_parser = duration_ms, conflicts_with = "http")]
    interval_ms: Duration,
    /// How long the server waits for a peer that does nothing, in milliseconds; a server that already
    /// runs must have been started with the same [default: 1000, or 10000 with --http]
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    patience_ms: Option<Duration>,
    /// How much memory may be added under the load, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8)]
    rss_allowance_mib: u64,
    /// The HTTP door of a server that already runs, of the test runner, and that nobody else uses
    #[arg(long, value_name = "URL", requires_all = ["grpc", "pid"])]
    http: Option<ServerUrl>,
    /// Its gRPC door, as `host:port`
    #[arg(long, value_name = "ADDR", value_parser = grpc_address, requires = "http")]
    grpc: Option<ServerUrl>,
    /// Its process, on this machine and of this user
    #[arg(long, value_name = "PID", requires = "http")]
    pid: Option<u32>,
    /// Write every look at the server, and all counts, to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with pictures to this file, as HTML that needs nothing from elsewhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What is wrong with an answer, or keeps one from coming.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("the connection broke: {0}")]
    Http1(#[from] hyper::Error),
    #[error("the stream broke: {0}")]
    Http2(#[from] h2::Error),
    #[error("{expected} was due, and there was {found}")]
    Answer { expected: String, found: String },
    #[error("token_{expected} was due, and {found} came")]
    Order { expected: u32, found: String },
    #[error("the stream ended after {0} tokens without its end")]
    CutOff(u32),
    #[error("there is what belongs to no answer: {0}")]
    Malformed(String),
    #[error("it hangs")]
    Hangs,
    #[error("the server's process cannot be looked at: {0}")]
    Gone(io::Error),
}

impl Fault {
    fn answer(expected: &str, found: impl Into<String>) -> Self {
        Self::Answer {
            expected: expected.to_owned(),
            found: found.into(),
        }
    }
}

/// How many requests may wait for a slot, as in the product by default.
const QUEUE: usize = 1_024;

/// Why nothing could be soaked.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Watch(#[from] Fault),
}

/// A run that goes on.
struct Soak<'a> {
    options: &'a Options,
    seed: u64,
    place: Place,
    watched: Watched,
    progress: ProgressBar,
}

/// Soaks a server, reports and judges.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let soaked = runtime
        .map_err(RunError::from)
        .and_then(|runtime| LocalSet::new().block_on(&runtime, soak_and_report(options, out)));
    match soaked {
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
async fn soak_and_report(options: &Options, out: &mut dyn Write) -> Result<bool, RunError> {
    let outcome = match (&options.http, &options.grpc, options.pid) {
        (Some(http), Some(grpc), Some(process)) => {
            let doors = Doors {
                http: http.clone(),
                grpc: grpc.clone(),
                patience: options.patience_ms.unwrap_or(DEFAULT_PATIENCE),
            };
            Soak::new(options, doors, process).run(out).await?
        }
        _ => {
            let patience = options.patience_ms.unwrap_or(OWN_PATIENCE);
            let server = own_server(options, patience).await?;
            let doors = Doors {
                http: server.http()?,
                grpc: server.grpc()?,
                patience,
            };
            let outcome = Soak::new(options, doors, server.id()?).run(out).await?;
            server.stop().await?;
            outcome
        }
    };
    writeln!(out, "\n{}\n", table::totals(&outcome.tally))?;
    for line in outcome.verdict() {
        writeln!(out, "{line}")?;
    }
    out.flush()?;
    if let Some(path) = &options.json {
        json::write(path, &outcome)?;
    }
    if let Some(path) = &options.html {
        html::write(path, &outcome)?;
    }
    Ok(outcome.is_good())
}

async fn own_server(options: &Options, patience: Duration) -> Result<OwnServer, ServerError> {
    let start = Start {
        role: Role::Product,
        interval: options.interval_ms,
        // A few less than there are clients: some of them must wait.
        slots: usize::from(options.clients) * 3 / 4 + 1,
        queue: QUEUE,
        grpc_listen: None,
        engine: None,
    };
    OwnServer::start_with_patience(&start, patience).await
}

impl<'a> Soak<'a> {
    fn new(options: &'a Options, doors: Doors, process: u32) -> Self {
        Self {
            options,
            seed: options.seed.unwrap_or_else(|| rand::random::<u32>().into()),
            watched: Watched {
                http: doors.http.clone(),
                process,
                began: Instant::now(),
            },
            place: Place {
                doors: Rc::new(doors),
                tally: Rc::new(RefCell::new(Tally::default())),
            },
            progress: progress(options.minutes),
        }
    }

    async fn run(self, out: &mut dyn Write) -> Result<Outcome, RunError> {
        let (doors, clients) = (&self.place.doors, usize::from(self.options.clients));
        writeln!(
            out,
            "{clients} clients at {} and {} for {:.1} min, --seed {}\n\n{}",
            doors.http,
            doors.grpc,
            self.options.minutes.as_secs_f64() / 60.0,
            self.seed,
            table::head()
        )?;
        let mut random = StdRng::seed_from_u64(self.seed);
        let ends = Instant::now() + self.options.minutes;
        let crowd = Crowd::enter(&self.place, clients, &mut random);
        self.progress.set_message("warm-up");
        sleep((self.options.minutes / WARM_UP_PART).min(WARM_UP)).await;
        crowd.leave().await;
        let before = self.before().await?;
        self.row(&before, out)?;

        let crowd = Crowd::enter(&self.place, clients, &mut random);
        self.progress.set_message("load");
        let steady = self.watch_until(ends, out).await?;
        crowd.leave().await;
        self.progress.set_message("all clients have left");
        let after = self
            .watched
            .wait(self.give_back(), |now| verdict::is_back(&before, now));
        let after = self.counted(after.await?);
        self.row(&after, out)?;
        self.progress.finish_and_clear();
        let leaks = verdict::leaks(&Evidence {
            before: &before,
            steady: &steady,
            after: &after,
            rss_allowance: self.options.rss_allowance_mib.saturating_mul(MIB),
        });
        Ok(Outcome {
            seed: self.seed,
            tally: self.place.tally.take(),
            before,
            steady,
            after,
            leaks,
        })
    }

    /// What the server holds when nobody is there. A socket may still be about to close, so the least of a
    /// few looks counts.
    async fn before(&self) -> Result<Sample, Fault> {
        let mut before = self.watched.wait(self.give_back(), Sample::is_idle).await?;
        for _ in 0..5 {
            let next = self.watched.wait(self.give_back(), Sample::is_idle).await?;
            before = Sample {
                descriptors: before.descriptors.min(next.descriptors),
                ..next
            };
        }
        Ok(self.counted(before))
    }

    /// Looks at the server until then.
    async fn watch_until(
        &self,
        ends: Instant,
        out: &mut dyn Write,
    ) -> Result<Vec<Sample>, RunError> {
        let (every, between_rows) = (
            (self.options.minutes / LOOKS).min(LOOK),
            self.options.minutes / ROWS,
        );
        let (mut samples, mut next_row) = (Vec::new(), Instant::now());
        while Instant::now() < ends {
            sleep_until((Instant::now() + every).min(ends)).await;
            match self.watched.sample().await {
                Ok(sample) => samples.push(self.counted(sample)),
                Err(gone @ Fault::Gone(_)) => return Err(gone.into()),
                Err(fault) => {
                    let fault = format!("the metrics: {fault}");
                    self.place.tally.borrow_mut().fault(fault);
                }
            }
            self.progress
                .set_position(self.watched.began.elapsed().as_secs());
            if let Some(last) = samples.last()
                && Instant::now() >= next_row
            {
                next_row += between_rows;
                self.row(last, out)?;
            }
        }
        Ok(samples)
    }

    /// A look, with what clients have done so far.
    fn counted(&self, sample: Sample) -> Sample {
        let tally = self.place.tally.borrow();
        Sample {
            streams_done: tally.streams(),
            faults: tally.fault_count(),
            ..sample
        }
    }

    fn row(&self, sample: &Sample, out: &mut dyn Write) -> io::Result<()> {
        self.progress.suspend(|| {
            writeln!(out, "{}", table::row(sample))?;
            out.flush()
        })
    }

    fn give_back(&self) -> Duration {
        self.place.doors.patience * 4 + GIVE_BACK
    }
}

fn progress(minutes: Duration) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(minutes.as_secs()), target);
    let style = ProgressStyle::with_template("{bar:30} {elapsed} of {len} s, {msg}");
    bar.set_style(style.expect("the template is valid"));
    bar
}

/// A time in minutes, which may have a fraction.
fn minutes(text: &str) -> Result<Duration, String> {
    let minutes: Option<f64> = text.parse().ok();
    minutes
        .and_then(|minutes| Duration::try_from_secs_f64(minutes * 60.0).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "it must be a number of minutes above 0".to_owned())
}
