//! The subcommand `streaming`: measures one stream through each API, as the reference system's performance test does.
//! It prints the figures of that test, and the one-way latency of the tokens.
//!
//! The APIs are measured one after the other, so that neither disturbs the other.

use std::io::Write;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};

mod measurement;

use measurement::Measurement;

use crate::arguments::{ServerUrl, parse_duration_ms, parse_grpc_address, parse_ms};
use crate::serve::{self, Role};
use crate::server::ServerProcess;
use crate::stream::Format;
use crate::{CommandResult, Verdict};

/// Number of slots of the server that the test starts.
const SLOTS: usize = 64;

/// Stream one completion through each API, and compare the intervals of its tokens with those of the test runner.
///
/// Exit codes: 0 if every token arrived once and in order, and the overhead is within the limit; 1 if not; 2 if the
/// arguments are wrong.
#[derive(Args)]
pub(crate) struct Options {
    /// Number of tokens to request, 2 or more.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Time between two tokens of the test runner, in milliseconds; 0 is full speed. A running server must have been
    /// started with the same interval.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_FREQUENCY_MS",
        default_value = "20",
        value_parser = parse_duration_ms
    )]
    interval_ms: Duration,
    /// Maximum overhead: mean time between two tokens minus --interval-ms, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        env = "TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS",
        default_value = "3",
        allow_negative_numbers = true,
        value_parser = parse_ms
    )]
    max_overhead_ms: f64,
    /// URL of a running server, without `/v1`. Without --http and --grpc, the test starts a server.
    #[arg(long, value_name = "URL", env = "SERVER_BASE_URL")]
    http: Option<ServerUrl>,
    /// gRPC address of a running server, as `host:port`.
    #[arg(long, value_name = "ADDR", value_parser = parse_grpc_address)]
    grpc: Option<ServerUrl>,
    /// Model to request [default: the only model of the server].
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

pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let (mut http, mut grpc) = (options.http.clone(), options.grpc.clone());
    // The server ends when this is dropped.
    let mut own = None;
    if http.is_none() && grpc.is_none() {
        let start = serve::Options::new(Role::Product, options.interval_ms, SLOTS, SLOTS);
        let server = own.insert(ServerProcess::start(&start).await?);
        (http, grpc) = (Some(server.http_url()?), Some(server.grpc_url()?));
        writeln!(out, "Measuring a server that this test started.")?;
        out.flush()?;
    }
    let apis = [
        (ApiChoice::Http, http, Format::Ndjson, "HTTP"),
        (ApiChoice::Grpc, grpc, Format::Grpc, "gRPC"),
    ];
    for (api, url, _, name) in &apis {
        match url {
            None if options.api == *api => missing_address_error(name).exit(),
            None if options.api == ApiChoice::Both => {
                writeln!(out, "The {name} API is not measured: no address was given.")?;
            }
            _ => {}
        }
    }
    let mut failures = Vec::new();
    for (api, url, format, name) in apis {
        let is_chosen = [api, ApiChoice::Both].contains(&options.api);
        let Some(url) = url.filter(|_| is_chosen) else {
            continue;
        };
        writeln!(out, "\n{name} at {url}")?;
        out.flush()?;
        let result = Measurement::run(options, &url, format, name).await;
        result.write(out)?;
        out.flush()?;
        let of_api = result.failures.into_iter();
        failures.extend(of_api.map(|failure| format!("{name}: {failure}")));
    }
    Ok(Verdict::of_failures(failures))
}

/// Returns the error for an API that --api selects and that has no address, while the other API has one.
fn missing_address_error(name: &str) -> clap::Error {
    let api = name.to_lowercase();
    let why = format!("--api {api} needs --{api} if another flag names a running server\n");
    clap::Error::raw(ErrorKind::MissingRequiredArgument, why)
}
