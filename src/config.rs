//! Reads the settings from the command line, the environment and the settings file. No other module
//! reads them.
//!
//! A flag overrides its environment variable, which overrides the file's key, which overrides the
//! default. Invalid settings are reported before anything starts: this module only builds
//! [`ServerParts`].

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

/// Serves large language models over gRPC and over an OpenAI-compatible HTTP API.
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
    /// Serve the HTTP and gRPC APIs with an engine in this process (the default command)
    Serve(Box<Serve>),
    /// Serve an engine over the gRPC API only
    Engine(Box<EngineCommand>),
    /// Serve the HTTP API in front of remote engines
    #[command(override_usage = "tokenway gateway --engine <ADDRESS> [OPTIONS]")]
    Gateway(Box<GatewayCommand>),
    /// Run a model for an engine in another process, by connecting to the engine's worker socket
    Worker(Box<WorkerCommand>),
    /// Stream a completion from a running server to the terminal
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
    /// Address of an engine's gRPC API, `http://host:port` or `unix:/path`. Separate several engines with
    /// commas, or repeat the flag. Required, here or in the settings file
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
    /// Address on which the gRPC API listens: `host:port` (port 0 chooses a free port) or `unix:/path`. For a
    /// Unix socket, gRPC clients in Python, C++ and Java need the channel option
    /// `grpc.default_authority=localhost` [default: 127.0.0.1:50051]
    #[arg(long, env = "TOKENWAY_GRPC_LISTEN", value_name = "ADDRESS")]
    grpc_listen: Option<Address>,
}

#[derive(Args, Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct ServerSettings {
    /// Time limit in seconds for a request whose client sets none. Above 0 [default: 600]
    #[arg(
        long,
        env = "TOKENWAY_REQUEST_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    request_timeout: Option<Seconds>,
    /// Time in seconds between the start of a shutdown and the closing of the listeners. New requests are
    /// answered with the error `draining` in this time. Set it longer than a load balancer needs to notice.
    /// 0 closes the listeners at once [default: 1]
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_GRACE",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    drain_grace: Option<Seconds>,
    /// Time in seconds that running streams get to finish after the listeners are closed. 0 ends them at
    /// once [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_DRAIN_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    drain_timeout: Option<Seconds>,
    /// Time in seconds for which an idle connection is kept open. Set it longer than the idle timeout of a
    /// load balancer in front. Above 0 [default: 75]
    #[arg(
        long,
        env = "TOKENWAY_KEEP_ALIVE_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    keep_alive_timeout: Option<Seconds>,
    /// Time limit in seconds for a client to send a request's headers, and the first bytes of a new
    /// connection. Above 0 [default: 10]
    #[arg(
        long,
        env = "TOKENWAY_HEADER_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    header_timeout: Option<Seconds>,
    /// Time in seconds after which a request ends if its body makes no progress. Above 0 [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_BODY_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    body_timeout: Option<Seconds>,
    /// Time in seconds after which a connection is closed if its client reads nothing of the response. Set
    /// it longer than --slow-reader-timeout, after which a stream ends with an error. Above 0 [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_WRITE_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    write_timeout: Option<Seconds>,
    /// Allow listening on addresses that other machines can reach. The server serves without any
    /// authentication: everyone who can reach the address can use the model [default: false]
    #[arg(long, env = "TOKENWAY_INSECURE", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    insecure: Option<bool>,
}

/// The command to run, with its settings.
pub enum Task {
    /// Run a server: `serve`, `engine` or `gateway`.
    Serve(Box<ServerParts>),
    /// Run a model for a remote engine: `worker`.
    Work(Box<WorkerTask>),
    /// Send a request to a running server: `complete`.
    Complete(ClientOptions),
}

/// The reason the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An error of clap about the command line or the environment. `--help` and `--version` are such
    /// errors too.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The settings file cannot be read or is invalid.
    #[error("settings file {path}: {problem}")]
    File {
        /// Path of the file.
        path: String,
        /// Description of the error.
        problem: String,
    },
    /// A setting is invalid in combination with others.
    #[error("{0}")]
    Invalid(String),
}

/// Reads the command line, the environment and the settings file.
///
/// # Errors
/// A setting is invalid. The text names the first invalid one.
pub fn read(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Task, ConfigError> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let matches = CommandLine::command()
        .try_get_matches_from(&arguments)
        .map_err(|error| variable::name_variable(error, &arguments))?;
    let CommandLine { command, serve } = CommandLine::from_arg_matches(&matches)?;
    let matches = matches
        .subcommand()
        .map_or(&matches, |(_, matches)| matches);
    let parts = match command.unwrap_or(Command::Serve(Box::new(serve))) {
        Command::Complete(options) => return Ok(Task::Complete(options)),
        Command::Worker(worker) => return Ok(Task::Work(Box::new(worker.task()?))),
        Command::Serve(serve) => serve.parts(matches)?,
        Command::Engine(engine) => engine.parts(matches)?,
        Command::Gateway(gateway) => gateway.parts()?,
    };
    Ok(Task::Serve(Box::new(parts)))
}

impl Serve {
    fn parts(self, matches: &ArgMatches) -> Result<ServerParts, ConfigError> {
        let file = self.file.read()?;
        let engine = self.engine.parts(&file, matches)?;
        let http = self.http.or(file.settings()?);
        let grpc = self.grpc.or(file.settings()?);
        let server = self.server.or(file.settings()?);
        server.parts(Source::Engine(engine), Some(http), Some(grpc))
    }
}

impl EngineCommand {
    fn parts(self, matches: &ArgMatches) -> Result<ServerParts, ConfigError> {
        let file = self.file.read()?;
        let engine = self.engine.parts(&file, matches)?;
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
            let message = "--engine is required for a gateway: give http://host:port or unix:/path";
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

    fn address(self) -> Address {
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
        let http = http.map(HttpSettings::frontend);
        let grpc = grpc.map(GrpcSettings::address);
        if !self.insecure.unwrap_or(false) {
            let http = http.iter().map(|http| ("http-listen", &http.listen));
            http.chain(grpc.iter().map(|address| ("grpc-listen", address)))
                .try_for_each(|(setting, address)| reject_public_address(setting, address))?;
        }
        let request_timeout = seconds(self.request_timeout, 600);
        if request_timeout.is_zero() {
            let message = "--request-timeout must be above 0 seconds (got 0)";
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
    /// The time limits of connections. None can be disabled, because a client that stops halfway would
    /// hold its connection forever.
    fn limits(&self) -> Result<Limits, ConfigError> {
        let default = Limits::default();
        let above_zero = |setting: &str, value: Option<Seconds>, default: Duration| {
            let time = value.map_or(default, Duration::from);
            if time.is_zero() {
                let message = format!(
                    "--{setting} must be above 0 seconds (got 0); set a large number for no limit"
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

/// Rejects an address that other machines can reach, because the server does not authenticate clients.
fn reject_public_address(setting: &str, address: &Address) -> Result<(), ConfigError> {
    if address.is_loopback() {
        return Ok(());
    }
    Err(ConfigError::Invalid(format!(
        "--{setting} {address} can be reached from other machines, and the server does not \
         authenticate clients. Use a loopback address or unix:/path, or set --insecure to allow it."
    )))
}

fn loopback(port: u16) -> Address {
    Address::Tcp(format!("127.0.0.1:{port}"))
}

fn seconds(setting: Option<Seconds>, default: u64) -> Duration {
    setting.map_or(Duration::from_secs(default), Duration::from)
}

/// Default number of threads of a model: all cores but one, which is left for the HTTP and gRPC APIs.
#[cfg(feature = "llama-cpp")]
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    cores.saturating_sub(1).max(1)
}

#[cfg(test)]
mod tests;
