//! The subcommand `streaming`: one stream at a time through each door, as the reference system's
//! performance test does it, and beside its figures what each token really cost.
//!
//! The doors are measured one after the other, so that neither disturbs the other.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};

use crate::arguments::{ServerUrl, duration_ms, grpc_address, number};
use crate::client::{GrpcStreamingClient, HttpStreamingClient, LlmStreamingClient, StreamRequest};
use crate::serve::Role;
use crate::server::{OwnServer, ServerError, Start};

mod door;

/// How many streams the test's own server runs at a time.
const SLOTS: usize = 64;

/// Stream one completion through each door and compare the intervals of its tokens with those of the
/// test runner.
///
/// Exit codes: 0 when every token came once, in order, and the overhead is within the limit; 1 when
/// not; 2 when the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// How many tokens to ask for, 2 or more.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// The interval of the test runner's tokens, in milliseconds; 0 is as fast as it can. A server
    /// that already runs must have been started with the same.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_FREQUENCY_MS",
        default_value = "20",
        value_parser = duration_ms
    )]
    interval_ms: Duration,
    /// How much longer than the test runner's the mean interval may be, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS",
        default_value = "3",
        allow_negative_numbers = true,
        value_parser = number
    )]
    max_overhead_ms: f64,
    /// The HTTP door of a server that already runs, without `/v1`. With neither this nor --grpc, a
    /// server is started for the test.
    #[arg(long, value_name = "URL", env = "SERVER_BASE_URL")]
    http: Option<ServerUrl>,
    /// The gRPC door of a server that already runs, as `host:port`.
    #[arg(long, value_name = "ADDR", value_parser = grpc_address)]
    grpc: Option<ServerUrl>,
    /// The model to ask for. Without it the server chooses, which it can when it has only one.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Which doors to measure.
    #[arg(long, value_enum, default_value_t = DoorChoice::Both)]
    door: DoorChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DoorChoice {
    Http,
    Grpc,
    Both,
}

/// What is to be measured, and by what it is judged.
struct Plan {
    request: StreamRequest,
    interval: Duration,
    max_overhead_ms: f64,
}

/// The doors to be measured. At least one is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Doors {
    http: Option<ServerUrl>,
    grpc: Option<ServerUrl>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

/// Measures, and prints the result to `out` and what is wrong to `err`.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let running = options.running_doors().unwrap_or_else(|error| error.exit());
    // One thread for the client: a token that has been read is taken without waking up another.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = runtime
        .map_err(RunError::from)
        .and_then(|runtime| runtime.block_on(measure(options, running, out)));
    let failures = match outcome {
        Ok(failures) => failures,
        Err(error) => vec![error.to_string()],
    };
    for failure in &failures {
        // There is nobody else to tell when even that fails.
        let _ = writeln!(err, "error: {failure}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Measures the doors of a running server, or of one of its own, and returns what is wrong with them.
async fn measure(
    options: &Options,
    running: Option<Doors>,
    out: &mut dyn Write,
) -> Result<Vec<String>, RunError> {
    let plan = Plan {
        request: StreamRequest {
            model: options.model.clone(),
            tokens: options.tokens,
        },
        interval: options.interval_ms,
        max_overhead_ms: options.max_overhead_ms,
    };
    if let Some(doors) = running {
        for (door, name) in [(&doors.http, "HTTP"), (&doors.grpc, "gRPC")] {
            if door.is_none() && options.door == DoorChoice::Both {
                writeln!(
                    out,
                    "The {name} door is not measured: no address was given."
                )?;
            }
        }
        return measure_doors(doors, &plan, out).await;
    }
    let start = Start {
        role: Role::Product,
        interval: plan.interval,
        slots: SLOTS,
        queue: SLOTS,
        grpc_listen: None,
        engine: None,
    };
    let server = OwnServer::start(&start).await?;
    let doors = Doors {
        http: match options.door {
            DoorChoice::Grpc => None,
            DoorChoice::Http | DoorChoice::Both => Some(server.http()?),
        },
        grpc: match options.door {
            DoorChoice::Http => None,
            DoorChoice::Grpc | DoorChoice::Both => Some(server.grpc()?),
        },
    };
    writeln!(out, "Measuring a server of this test's own.")?;
    out.flush()?;
    let failures = measure_doors(doors, &plan, out).await?;
    server.stop().await.map_err(ServerError::from)?;
    Ok(failures)
}

async fn measure_doors(
    doors: Doors,
    plan: &Plan,
    out: &mut dyn Write,
) -> Result<Vec<String>, RunError> {
    let mut failures = Vec::new();
    if let Some(url) = doors.http {
        failures
            .extend(measure_door(HttpStreamingClient::new(url.clone()), &url, plan, out).await?);
    }
    if let Some(url) = doors.grpc {
        failures
            .extend(measure_door(GrpcStreamingClient::new(url.clone()), &url, plan, out).await?);
    }
    Ok(failures)
}

async fn measure_door<C: LlmStreamingClient>(
    client: C,
    url: &ServerUrl,
    plan: &Plan,
    out: &mut dyn Write,
) -> io::Result<Vec<String>> {
    writeln!(out, "\n{} at {url}", C::DOOR)?;
    out.flush()?;
    let result = door::measure(&client, plan).await;
    result.write(out)?;
    out.flush()?;
    let name = |failure: String| format!("{}: {failure}", C::DOOR);
    Ok(result.failures.into_iter().map(name).collect())
}

impl Options {
    /// The doors of a server that already runs; `None` when none was named.
    fn running_doors(&self) -> Result<Option<Doors>, clap::Error> {
        let missing = |argument: &str, other: &str| {
            let message = format!(
                "--door {} needs {argument} where {other} names a server that already runs\n",
                argument.trim_start_matches('-'),
            );
            clap::Error::raw(ErrorKind::MissingRequiredArgument, message)
        };
        let (http, grpc) = (self.http.clone(), self.grpc.clone());
        match (self.door, http, grpc) {
            (_, None, None) => Ok(None),
            (DoorChoice::Http, None, Some(_)) => Err(missing("--http", "--grpc")),
            (DoorChoice::Grpc, Some(_), None) => Err(missing("--grpc", "--http")),
            (DoorChoice::Http, http, _) => Ok(Some(Doors { http, grpc: None })),
            (DoorChoice::Grpc, _, grpc) => Ok(Some(Doors { http: None, grpc })),
            (DoorChoice::Both, http, grpc) => Ok(Some(Doors { http, grpc })),
        }
    }
}
