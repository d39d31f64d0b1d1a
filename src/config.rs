//! The command line, the environment and the settings file: the one place that reads them.
//!
//! A flag goes before its environment variable, that before the file's key, and that before the
//! default. Whatever is invalid is an error before anything binds. It must not start anything: it
//! makes [`ServerParts`].

use std::time::Duration;

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::Deserialize;

use crate::client::ClientOptions;
use crate::listen::{Address, Limits};
use crate::server::{Drain, ServerParts, Source};

mod engine;
mod file;
mod http;
mod model;
mod runner;
mod values;
mod variable;
mod worker;

use engine::EngineSettings;
use http::HttpSettings;
use values::{EngineAddress, Seconds};
use worker::WorkerCommand;
pub use worker::WorkerTask;

/// Streams the tokens of a large language model over gRPC and over OpenAI's HTTP.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve both doors over an engine in this process (the default command)
    Serve(Box<Serve>),
    /// Serve an engine's gRPC door alone
    Engine(Box<EngineCommand>),
    /// Serve the HTTP door alone, in front of engines elsewhere
    #[command(override_usage = "tokenway gateway --engine <ADDRESS> [OPTIONS]")]
    Gateway(Box<GatewayCommand>),
    /// Run a model for an engine in another process: dial its worker socket
    Worker(Box<WorkerCommand>),
    /// Stream a completion from a running server to this terminal
    Complete(ClientOptions),
}

#[derive(Args)]
struct Serve {
    #[command(flatten)]
    file: file::FileOption,
    #[command(flatten)]
    engine: EngineSettings,
    #[command(flatten)]
    http: HttpSettings,
    #[command(flatten)]
    grpc: GrpcSettings,
    #[command(flatten)]
    server: ServerSettings,
}

#[derive(Args)]
struct EngineCommand {
    #[command(flatten)]
    file: file::FileOption,
    #[command(flatten)]
    engine: EngineSettings,
    #[command(flatten)]
    grpc: GrpcSettings,
    #[command(flatten)]
    server: ServerSettings,
}

#[derive(Args)]
struct GatewayCommand {
    #[command(flatten)]
    file: file::FileOption,
    #[command(flatten)]
    gateway: GatewaySettings,
    #[command(flatten)]
    http: HttpSettings,
    #[command(flatten)]
    server: ServerSettings,
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
struct GatewaySettings {
    /// Required, here or in the settings file: an engine's gRPC address, `http://host:port` or
    /// `unix:/path`; several by commas or by repeating the flag
    #[arg(
        long,
        env = "TOKENWAY_ENGINE",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    engine: Option<Vec<EngineAddress>>,
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
struct GrpcSettings {
    /// Where the gRPC door listens: `host:port` (port 0 takes a free one) or `unix:/path`, for which gRPC's
    /// clients in Python, C++ and Java need the channel option `grpc.default_authority=localhost`
    /// [default: 127.0.0.1:50051]
    #[arg(long, env = "TOKENWAY_GRPC_LISTEN", value_name = "ADDRESS")]
    grpc_listen: Option<Address>,
}

#[derive(Args, Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct ServerSettings {
    /// How long a request may take where its client does not say, in seconds [default: 600]
    #[arg(
        long,
        env = "TOKENWAY_REQUEST_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    request_timeout: Option<Seconds>,
    /// How long a server that ends goes on answering 'draining' before it closes its listeners, in
    /// seconds: longer than a load balancer takes to notice [default: 1]
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_GRACE",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    drain_grace: Option<Seconds>,
    /// How long running streams may take to end after that, in seconds [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    drain_timeout: Option<Seconds>,
    /// How long an idle connection is kept open, in seconds: longer than the load balancer in front keeps
    /// its own. Above 0 [default: 75]
    #[arg(
        long,
        env = "TOKENWAY_KEEP_ALIVE_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    keep_alive_timeout: Option<Seconds>,
    /// How long the headers of a request may take, and the first bytes of a new connection, in seconds.
    /// Above 0 [default: 10]
    #[arg(
        long,
        env = "TOKENWAY_HEADER_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    header_timeout: Option<Seconds>,
    /// How long the body of a request may make no progress, in seconds. Above 0 [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_BODY_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    body_timeout: Option<Seconds>,
    /// How long a client may read nothing of its answer before its connection is closed, in seconds: longer
    /// than --slow-reader-timeout, after which its stream ends with an error. Above 0 [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_WRITE_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    write_timeout: Option<Seconds>,
    /// Listen also on addresses that other machines reach: serves without any authentication, so
    /// whoever reaches them may use the model
    #[arg(long, env = "TOKENWAY_INSECURE", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    insecure: Option<bool>,
}

/// What the command line asks for.
pub enum Task {
    /// Serve.
    Serve(Box<ServerParts>),
    /// Run a model for an engine elsewhere.
    Work(Box<WorkerTask>),
    /// Ask a running server.
    Complete(ClientOptions),
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The command line or the environment. It is clap's, and `--help` is one of them.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The settings file.
    #[error("the settings file {path}: {problem}")]
    File {
        /// Which file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A setting that is valid by itself but not with the others.
    #[error("{0}")]
    Invalid(String),
}

/// Reads the command line, the environment and the settings file.
///
/// # Errors
/// The first setting that is at fault, by its name.
pub fn read(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Task, ConfigError> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let matches = CommandLine::command()
        .try_get_matches_from(&arguments)
        .map_err(|error| variable::name_in(error, &arguments))?;
    let CommandLine { command, serve } = CommandLine::from_arg_matches(&matches)?;
    let given = matches.subcommand().map_or(&matches, |(_, given)| given);
    let parts = match command.unwrap_or(Command::Serve(Box::new(serve))) {
        Command::Complete(options) => return Ok(Task::Complete(options)),
        Command::Worker(worker) => return Ok(Task::Work(Box::new(worker.task()?))),
        Command::Serve(serve) => serve.parts(given)?,
        Command::Engine(engine) => engine.parts(given)?,
        Command::Gateway(gateway) => gateway.parts()?,
    };
    Ok(Task::Serve(Box::new(parts)))
}

impl Serve {
    fn parts(self, given: &ArgMatches) -> Result<ServerParts, ConfigError> {
        let file = self.file.read()?;
        let engine = self.engine.parts(&file, given)?;
        let http = self.http.or(file.settings()?);
        let grpc = self.grpc.or(file.settings()?);
        let server = self.server.or(file.settings()?);
        server.parts(Source::Engine(engine), Some(http), Some(grpc))
    }
}

impl EngineCommand {
    fn parts(self, given: &ArgMatches) -> Result<ServerParts, ConfigError> {
        let file = self.file.read()?;
        let engine = self.engine.parts(&file, given)?;
        let grpc = self.grpc.or(file.settings()?);
        let server = self.server.or(file.settings()?);
        server.parts(Source::Engine(engine), None, Some(grpc))
    }
}

impl GatewayCommand {
    fn parts(self) -> Result<ServerParts, ConfigError> {
        let file = self.file.read()?;
        let gateway: GatewaySettings = file.settings()?;
        let engines = self.gateway.engine.or(gateway.engine).unwrap_or_default();
        if engines.is_empty() {
            let message = "a gateway needs at least one --engine http://host:port or unix:/path";
            return Err(ConfigError::Invalid(message.to_owned()));
        }
        let engines = engines.into_iter().map(String::from).collect();
        let http = self.http.or(file.settings()?);
        let server = self.server.or(file.settings()?);
        server.parts(Source::Remote(engines), Some(http), None)
    }
}

impl GrpcSettings {
    fn or(self, file: Self) -> Self {
        Self {
            grpc_listen: self.grpc_listen.or(file.grpc_listen),
        }
    }

    fn listen(self) -> Address {
        self.grpc_listen.unwrap_or_else(|| loopback(50_051))
    }
}

impl ServerSettings {
    fn or(self, file: Self) -> Self {
        Self {
            request_timeout: self.request_timeout.or(file.request_timeout),
            drain_grace: self.drain_grace.or(file.drain_grace),
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
            keep_alive_timeout: self.keep_alive_timeout.or(file.keep_alive_timeout),
            header_timeout: self.header_timeout.or(file.header_timeout),
            body_timeout: self.body_timeout.or(file.body_timeout),
            write_timeout: self.write_timeout.or(file.write_timeout),
            insecure: self.insecure.or(file.insecure),
        }
    }

    fn parts(
        self,
        source: Source,
        http: Option<HttpSettings>,
        grpc: Option<GrpcSettings>,
    ) -> Result<ServerParts, ConfigError> {
        let (http, grpc) = (http.map(HttpSettings::door), grpc.map(GrpcSettings::listen));
        if !self.insecure.unwrap_or(false) {
            let http = http.iter().map(|door| ("http-listen", &door.listen));
            http.chain(grpc.iter().map(|listen| ("grpc-listen", listen)))
                .try_for_each(|(setting, address)| reject_public_address(setting, address))?;
        }
        let request_timeout = seconds(self.request_timeout, 600);
        if request_timeout.is_zero() {
            let message = "--request-timeout must be above 0: no request could be answered in time";
            return Err(ConfigError::Invalid(message.to_owned()));
        }
        Ok(ServerParts {
            source,
            http,
            grpc,
            limits: self.limits()?,
            request_timeout,
            drain: Drain {
                grace: seconds(self.drain_grace, 1),
                timeout: seconds(self.drain_timeout, 30),
            },
        })
    }
}

impl ServerSettings {
    /// The time limits of connections. None of them can be switched off: a client that stops in the middle
    /// would keep its connection for ever.
    fn limits(&self) -> Result<Limits, ConfigError> {
        let default = Limits::default();
        let above_zero = |setting: &str, value: Option<Seconds>, default: Duration| {
            let time = value.map_or(default, Duration::from);
            if time.is_zero() {
                let message = format!(
                    "--{setting} must be above 0 seconds (got 0); a large number is as good as no limit"
                );
                return Err(ConfigError::Invalid(message));
            }
            Ok(time)
        };
        Ok(Limits {
            keep_alive_timeout: above_zero(
                "keep-alive-timeout",
                self.keep_alive_timeout,
                default.keep_alive_timeout,
            )?,
            header_timeout: above_zero(
                "header-timeout",
                self.header_timeout,
                default.header_timeout,
            )?,
            body_timeout: above_zero("body-timeout", self.body_timeout, default.body_timeout)?,
            write_timeout: above_zero("write-timeout", self.write_timeout, default.write_timeout)?,
            ..default
        })
    }
}

/// Whoever reaches the address may use the model, as long as there are no keys.
fn reject_public_address(setting: &str, address: &Address) -> Result<(), ConfigError> {
    if address.is_loopback() {
        return Ok(());
    }
    Err(ConfigError::Invalid(format!(
        "--{setting} {address} can be reached from other machines, and nobody has to show a key. Use \
         a loopback address or unix:/path, or say --insecure if that is meant."
    )))
}

fn loopback(port: u16) -> Address {
    Address::Tcp(format!("127.0.0.1:{port}"))
}

fn seconds(setting: Option<Seconds>, default: u64) -> Duration {
    setting.map_or(Duration::from_secs(default), Duration::from)
}

#[cfg(feature = "llama-cpp")]
/// How many threads a model may compute on: one core is left for the doors.
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    cores.saturating_sub(1).max(1)
}

#[cfg(test)]
mod tests;
