//! Reads the settings from the command line, the environment and the settings file. No other module reads them.
//!
//! A flag overrides its environment variable, which overrides the file's key, which overrides the default. Invalid
//! settings are reported before anything starts: this module only builds [`ServerParts`].
//!
//! Each setting is declared once, as a field of a struct. The field has the setting's name, environment variable,
//! default and help text; the field's type checks the value. All layers are merged into one table, `Settings`, which
//! is deserialised into the struct.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::certificates::TlsCommand;
use crate::client::ClientOptions;
use crate::keys::KeysCommand;
use crate::logging::LogFormat;
use crate::server::ServerParts;
use crate::server::run::{ModelFiles, OnHangup};

mod admin;
mod check;
mod cluster;
mod commands;
mod downloads;
mod engine;
mod error;
mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod grpc;
mod http;
mod hub_variables;
mod keys;
mod log;
mod model;
mod nested_tables;
mod reload;
mod runner;
mod server;
mod settings;
mod show;
mod tls;
mod values;
mod variable;
mod worker;

use commands::{EngineCommandSettings, GatewaySettings, ServeSettings, ServerCommand};
pub use downloads::AfterDownload;
use error::first_error;
pub use error::{ConfigError, FileError, Position};
use file::{KnownKeys, ParsedFile};
use log::FormatSettings;
use settings::{Settings, keys};
use worker::AttachSettings;
pub use worker::WorkerTask;

/// Stands for the path of the settings file in errors, if the settings come from standard input.
const STDIN_NAME: &str = "standard input";

/// Serves large language models over gRPC and over an OpenAI-compatible HTTP API.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: WithFile<ServeSettings>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the HTTP and gRPC APIs with an engine in this process (the default command)
    Serve(Box<WithFile<ServeSettings>>),
    /// Serve an engine over the gRPC API only
    Engine(Box<WithFile<EngineCommandSettings>>),
    /// Serve the HTTP and gRPC APIs in front of remote engines
    #[command(override_usage = "tokenway gateway --engine <ADDRESS> [OPTIONS]")]
    Gateway(Box<WithFile<GatewaySettings>>),
    /// Run a model for an engine in another process, by connecting to the engine's worker socket
    Worker(Box<WithStdin<AttachSettings>>),
    /// Stream a completion from a running server to the terminal
    Complete(ClientOptions),
    /// Create, list, revoke and rotate the API keys in a keys file
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Create certificates for trying TLS
    #[command(subcommand)]
    Tls(TlsCommand),
    /// List the downloaded models
    #[cfg(feature = "llama-cpp")]
    Models,
    /// Check a settings file, or show the settings in force
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check a settings file and print every problem with its line. Flags and environment variables are
    /// ignored. The exit code is 0 for a valid file and 2 for an invalid one
    Check {
        /// Path of the settings file
        file: PathBuf,
    },
    /// Show the settings that `tokenway serve` would use with the same flags, as a settings file with the
    /// source of each value
    Show(Box<WithFile<ServeSettings>>),
}

/// Settings of a command that also accepts a settings file (`--config`).
#[derive(Args)]
struct WithFile<S: Args> {
    /// Path of a TOML file with settings. Its keys are the flags' names with `_` instead of `-`. To serve
    /// several models, write one `[[model]]` table per model [default: none]
    #[arg(long, env = "TOKENWAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: S,
}

/// Settings of `tokenway worker`. An engine passes settings to the workers that it starts through their standard
/// input.
#[derive(Args)]
struct WithStdin<S: Args> {
    /// Read settings as TOML from standard input
    #[arg(long, hide = true)]
    settings_from_stdin: bool,
    #[command(flatten)]
    settings: S,
}

/// A parsed command line: the command to run, with its settings.
pub enum ParsedCommand {
    /// Run a server: `serve`, `engine` or `gateway`.
    Serve(Box<ServerTask>),
    /// Run a model for a remote engine: `worker`.
    Work(Box<WorkerTask>),
    /// Send a request to a running server: `complete`.
    Complete(ClientOptions),
    /// Change or list API keys: `keys`.
    Keys(KeysCommand),
    /// Create certificates: `tls`.
    Tls(TlsCommand),
    /// Print this text: `config` and `models`.
    Print(String),
}

/// A server to run, with the settings of its process.
pub struct ServerTask {
    /// Parts of the server.
    pub parts: AfterDownload<ServerParts>,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Effect of SIGHUP: a gateway reads its settings file again.
    pub on_hangup: OnHangup,
}

/// Reads the command line, the environment and the settings file.
///
/// # Errors
/// A setting is invalid. The text names the first invalid one.
pub fn read(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<ParsedCommand, ConfigError> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let mut command = command_line();
    let is_subcommand = |name| command.find_subcommand(name).is_some();
    if arguments.get(1).is_some_and(is_subcommand) {
        // A command line that names a subcommand has no flags of the default command. The environment variables of
        // the default command must not apply either.
        command = command.mut_args(|argument| argument.env(None::<&'static str>));
    }
    let matches = command
        .clone()
        .try_get_matches_from(&arguments)
        .map_err(|error| variable::name_environment_variable(error, &command, &arguments))?;
    let CommandLine { command, serve } = CommandLine::from_arg_matches(&matches)?;
    let matches = innermost_matches(&matches);
    match command.unwrap_or(Command::Serve(Box::new(serve))) {
        Command::Serve(command) => command.server_task(matches),
        Command::Engine(command) => command.server_task(matches),
        Command::Gateway(command) => command.server_task(matches),
        Command::Worker(command) => {
            let worker = AttachSettings::worker_task(command.read(matches)?)?;
            Ok(ParsedCommand::Work(Box::new(worker)))
        }
        Command::Complete(options) => {
            let options = options.with_api_key(keys::client_key()?);
            Ok(ParsedCommand::Complete(options))
        }
        Command::Keys(command) => Ok(ParsedCommand::Keys(command)),
        Command::Tls(command) => Ok(ParsedCommand::Tls(command)),
        #[cfg(feature = "llama-cpp")]
        Command::Models => hub_variables::list_models().map(ParsedCommand::Print),
        Command::Config(ConfigCommand::Check { file }) => {
            check::check_file(&file.display().to_string()).map(ParsedCommand::Print)
        }
        Command::Config(ConfigCommand::Show(command)) => {
            let settings = command.read(matches)?;
            let resolved = commands::resolve_server::<ServeSettings>(&settings, &ModelFiles::new());
            let (_, models) = resolved.map_err(ConfigError::first)?;
            Ok(ParsedCommand::Print(
                show::render_settings::<ServeSettings>(&settings, &models),
            ))
        }
    }
}

/// Builds the clap command. Flags accept negative numbers as values, so that the error says why a number is invalid.
/// Otherwise clap would report the number as an unknown flag.
fn command_line() -> clap::Command {
    let allow = |command: clap::Command| {
        command.mut_args(|argument| match argument.get_long() {
            Some(_) if argument.get_action().takes_values() => {
                argument.allow_negative_numbers(true)
            }
            _ => argument,
        })
    };
    allow(CommandLine::command()).mut_subcommands(|command| match command.get_name() {
        "complete" => command,
        _ => allow(command).mut_subcommands(allow),
    })
}

/// Returns the parsed arguments of the innermost subcommand on the command line.
fn innermost_matches(matches: &ArgMatches) -> &ArgMatches {
    match matches.subcommand() {
        Some((_, matches)) => innermost_matches(matches),
        None => matches,
    }
}

impl<S: ServerCommand> WithFile<S> {
    fn server_task(&self, matches: &ArgMatches) -> Result<ParsedCommand, ConfigError> {
        let settings = self.read(matches)?;
        let resolve = |settings: &Settings, files: &ModelFiles| {
            commands::resolve_server::<S>(settings, files).map_err(ConfigError::first)
        };
        let (parts, models) = resolve(&settings, &ModelFiles::new())?;
        let again = settings.clone();
        let parts = AfterDownload::new(parts, downloads::downloads(&models)?, move |files| {
            resolve(&again, files).map(|(parts, _)| parts)
        });
        let log_format = settings.get::<FormatSettings>()?.format();
        let on_hangup = reload::on_hangup::<S>(matches, self.config.as_deref(), settings);
        Ok(ParsedCommand::Serve(Box::new(ServerTask {
            parts,
            log_format,
            on_hangup,
        })))
    }

    fn read(&self, matches: &ArgMatches) -> Result<Settings, ConfigError> {
        merge_settings::<S>(matches, self.config.as_deref())
    }
}

/// Merges the flags, the environment variables and the settings file.
fn merge_settings<S: ServerCommand>(
    matches: &ArgMatches,
    file: Option<&Path>,
) -> Result<Settings, ConfigError> {
    let mut settings = Settings::from_matches::<S>(matches)?;
    let Some(path) = file else {
        return Ok(settings);
    };
    let path = path.display().to_string();
    let file = ParsedFile::read(&path, &commands::known_keys()).valid()?;
    settings.add_file::<S>(&file).map_err(first_error)?;
    Ok(settings)
}

impl WithStdin<AttachSettings> {
    /// Merges the flags, the environment variables and the settings on standard input.
    fn read(&self, matches: &ArgMatches) -> Result<Settings, ConfigError> {
        let text = match self.settings_from_stdin {
            true => std::io::read_to_string(std::io::stdin()),
            false => Ok(String::new()),
        };
        let text = text.map_err(|error| ConfigError::Invalid(format!("{STDIN_NAME}: {error}")))?;
        worker_settings(matches, &text)
    }
}

/// Merges the flags and the environment variables of a worker with its settings from standard input.
fn worker_settings(matches: &ArgMatches, text: &str) -> Result<Settings, ConfigError> {
    let mut settings = Settings::from_matches::<AttachSettings>(matches)?;
    let known = KnownKeys {
        top: keys::<AttachSettings>().into_iter().collect(),
        model: BTreeSet::new(),
    };
    let file = ParsedFile::parse(STDIN_NAME, text, &known).valid()?;
    settings
        .add_file::<AttachSettings>(&file)
        .map_err(first_error)?;
    Ok(settings)
}

#[cfg(test)]
mod tests;
