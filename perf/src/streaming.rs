//! The subcommand `streaming`: one stream at a time through each API, as the reference system's
//! performance test does it. It prints the reference's figures, and the real latency of each token.
//!
//! The APIs are measured one after the other, so that neither disturbs the other.

use std::io::Write;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};

mod measurement;

use measurement::Plan;

use crate::arguments::{ServerUrl, duration_ms, grpc_address, number};
use crate::serve::{self, Role};
use crate::server::OwnServer;
use crate::stream::Format;
use crate::{Outcome, Verdict};

/// Slots of the test's own server.
const SLOTS: usize = 64;

/// Stream one completion through each API, and compare the intervals of its tokens with those of the
/// test runner.
///
/// Exit codes: 0 if every token arrived once and in order, and the overhead is within the limit; 1 if
/// not; 2 if the arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Number of tokens to request, 2 or more.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Interval of the test runner's tokens, in milliseconds; 0 is full speed. A running server must have
    /// been started with the same interval.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_FREQUENCY_MS",
        default_value = "20",
        value_parser = duration_ms
    )]
    interval_ms: Duration,
    /// Limit of the difference between the mean interval and the test runner's, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS",
        default_value = "3",
        allow_negative_numbers = true,
        value_parser = number
    )]
    max_overhead_ms: f64,
    /// HTTP API of a running server, without `/v1`. With neither this nor --grpc, a server is started for
    /// the test.
    #[arg(long, value_name = "URL", env = "SERVER_BASE_URL")]
    http: Option<ServerUrl>,
    /// gRPC API of a running server, as `host:port`.
    #[arg(long, value_name = "ADDR", value_parser = grpc_address)]
    grpc: Option<ServerUrl>,
    /// Model to request. Without it the server chooses, if it has only one.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// APIs to measure.
    #[arg(long, value_enum, default_value_t = ApiChoice::Both)]
    api: ApiChoice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ApiChoice {
    Http,
    Grpc,
    Both,
}

/// Addresses of the APIs to measure. At least one is set.
#[derive(Clone, Debug)]
struct Apis {
    http: Option<ServerUrl>,
    grpc: Option<ServerUrl>,
}

/// Measures, and prints the figures to `out`.
pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let running = options.running_apis().unwrap_or_else(|error| error.exit());
    let plan = Plan {
        model: options.model.clone(),
        tokens: options.tokens,
        interval: options.interval_ms,
        max_overhead_ms: options.max_overhead_ms,
    };
    if let Some(apis) = running {
        for (address, name) in [(&apis.http, "HTTP"), (&apis.grpc, "gRPC")] {
            if address.is_none() && options.api == ApiChoice::Both {
                writeln!(out, "The {name} API is not measured: no address was given.")?;
            }
        }
        return measure(apis, &plan, out).await;
    }
    let start = serve::Options::new(Role::Product, plan.interval, SLOTS, SLOTS);
    let server = OwnServer::start(&start).await?;
    let apis = Apis {
        http: match options.api {
            ApiChoice::Grpc => None,
            ApiChoice::Http | ApiChoice::Both => Some(server.http()?),
        },
        grpc: match options.api {
            ApiChoice::Http => None,
            ApiChoice::Grpc | ApiChoice::Both => Some(server.grpc()?),
        },
    };
    writeln!(out, "Measuring a server of this test's own.")?;
    out.flush()?;
    let verdict = measure(apis, &plan, out).await?;
    server.stop().await?;
    Ok(verdict)
}

async fn measure(apis: Apis, plan: &Plan, out: &mut dyn Write) -> Outcome {
    let mut failures = Vec::new();
    for (url, format, name) in [
        (apis.http, Format::Ndjson, "HTTP"),
        (apis.grpc, Format::Grpc, "gRPC"),
    ] {
        let Some(url) = url else { continue };
        writeln!(out, "\n{name} at {url}")?;
        out.flush()?;
        let result = plan.measure(&url, format, name).await;
        result.write(out)?;
        out.flush()?;
        failures.extend(
            result
                .failures
                .into_iter()
                .map(|failure| format!("{name}: {failure}")),
        );
    }
    Ok(Verdict::of_failures(failures))
}

impl Options {
    /// APIs of a running server; `None` if no address was given.
    fn running_apis(&self) -> Result<Option<Apis>, clap::Error> {
        let missing = |flag: &str, given: &str| {
            let api = flag.trim_start_matches('-');
            let message = format!("--api {api} needs {flag} if {given} names a running server\n");
            clap::Error::raw(ErrorKind::MissingRequiredArgument, message)
        };
        let (http, grpc) = (self.http.clone(), self.grpc.clone());
        match (self.api, http, grpc) {
            (_, None, None) => Ok(None),
            (ApiChoice::Http, None, Some(_)) => Err(missing("--http", "--grpc")),
            (ApiChoice::Grpc, Some(_), None) => Err(missing("--grpc", "--http")),
            (ApiChoice::Http, http, _) => Ok(Some(Apis { http, grpc: None })),
            (ApiChoice::Grpc, _, grpc) => Ok(Some(Apis { http: None, grpc })),
            (ApiChoice::Both, http, grpc) => Ok(Some(Apis { http, grpc })),
        }
    }
}
