//! Settings of one model: its workers, its queue and its slow readers.

use std::ffi::OsString;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::file::SettingsFile;
use super::runner::{LoaderSettings, RunnerSettings};
use super::values::{Count, Seconds};
use super::{ConfigError, seconds};
use crate::request::MAX_MODEL_NAME_BYTES;
use crate::server::{Isolation, ModelParts};
use crate::worker::child::Program;

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ModelSettings {
    #[command(flatten)]
    #[serde(flatten)]
    runner: RunnerSettings,
    /// Number of workers that the engine starts. Each loads the model [default: 1, or 0 for --runner attached]
    #[arg(long, env = "TOKENWAY_WORKERS", value_name = "N")]
    workers: Option<Count<u16>>,
    /// Place of these workers: a thread of the engine, or a child process for each worker, whose crash does
    /// not affect the engine [default: thread]
    #[arg(long, env = "TOKENWAY_ISOLATION", value_name = "PLACE")]
    isolation: Option<IsolationKind>,
    /// Maximum number of requests that wait for a slot. Further requests are rejected with the error
    /// `queue_full`. 0: no request waits [default: 1024]
    #[arg(long, env = "TOKENWAY_QUEUE_DEPTH", value_name = "N")]
    queue_depth: Option<u32>,
    /// Time in seconds after which a stream ends with an error if its client reads nothing [default: 10]
    #[arg(
        long,
        env = "TOKENWAY_SLOW_READER_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    slow_reader_timeout: Option<Seconds>,
}

/// Place of an engine's local workers, the value of `--isolation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(try_from = "String")]
pub(super) enum IsolationKind {
    /// Each worker is a thread of the engine.
    Thread,
    /// Each worker is a child process of the engine.
    Process,
}

impl TryFrom<String> for IsolationKind {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::from_str(&name, false).map_err(|_| "must be thread or process")
    }
}

/// Source of a model's settings. Errors name settings in the source's notation.
pub(super) enum Origin<'a> {
    /// Flags, environment variables, or keys outside `[[model]]` tables.
    Flags,
    /// The `[[model]]` table with this number, from 1.
    Table(&'a SettingsFile, usize),
}

impl Origin<'_> {
    /// The name of a setting in this source, such as `--queue-depth` or `model[1].queue_depth`.
    pub(super) fn name(&self, key: &str) -> String {
        match self {
            Self::Flags if key == "aliases" => "--model-alias".to_owned(),
            Self::Flags => format!("--{}", key.replace('_', "-")),
            Self::Table(_, number) => {
                let key = if key == "model_name" { "name" } else { key };
                format!("model[{number}].{key}")
            }
        }
    }

    pub(super) fn error(&self, problem: String) -> ConfigError {
        match self {
            Self::Flags => ConfigError::Invalid(problem),
            Self::Table(file, _) => file.error(problem),
        }
    }

    /// Rejects a model name that no request could use.
    pub(super) fn check_name(&self, key: &str, name: &str) -> Result<(), ConfigError> {
        let key = self.name(key);
        if name.is_empty() {
            let problem =
                format!("{key} must not be empty: requests select the model by this name");
            return Err(self.error(problem));
        }
        if name.len() > MAX_MODEL_NAME_BYTES {
            let length = name.len();
            let problem =
                format!("{key} must be at most {MAX_MODEL_NAME_BYTES} bytes long (got {length})");
            return Err(self.error(problem));
        }
        Ok(())
    }

    /// Rejects settings that the chosen runner does not use, because they are probably a mistake.
    /// `purpose` says what the settings are for.
    pub(super) fn reject_unused(
        &self,
        settings: &[(&str, bool)],
        purpose: &str,
        runner: &str,
    ) -> Result<(), ConfigError> {
        match settings.iter().find(|(_, is_set)| *is_set) {
            None => Ok(()),
            Some((key, _)) => Err(self.error(format!(
                "{} is {purpose} (the runner is {runner})",
                self.name(key)
            ))),
        }
    }
}

impl ModelSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            runner: self.runner.or(file.runner),
            workers: self.workers.or(file.workers),
            isolation: self.isolation.or(file.isolation),
            queue_depth: self.queue_depth.or(file.queue_depth),
            slow_reader_timeout: self.slow_reader_timeout.or(file.slow_reader_timeout),
        }
    }

    /// Fills unset settings from `shared`, the settings that apply to all models.
    pub(super) fn or_shared(self, shared: &Self) -> Self {
        Self {
            queue_depth: self.queue_depth.or(shared.queue_depth),
            slow_reader_timeout: self.slow_reader_timeout.or(shared.slow_reader_timeout),
            isolation: self.isolation.or(shared.isolation),
            ..self
        }
    }

    /// Builds the model with this name, or with the runner's default name.
    pub(super) fn parts(
        self,
        name: Option<String>,
        aliases: Vec<String>,
        origin: &Origin<'_>,
    ) -> Result<ModelParts, ConfigError> {
        let is_attached = self.runner.is_attached();
        if is_attached {
            self.check_attached(name.is_some(), origin)?;
        }
        let (workers, isolation) = (self.workers, self.isolation);
        let (queue_depth, slow_reader) = (self.queue_depth, self.slow_reader_timeout);
        let arguments = self.runner.worker_arguments();
        let LoaderSettings {
            default_name,
            loader,
            slots,
        } = self.runner.loader(origin)?;
        let name = name.unwrap_or(default_name);
        origin.check_name("model_name", &name)?;
        for alias in &aliases {
            origin.check_name("aliases", alias)?;
        }
        Ok(ModelParts {
            loader,
            workers: match is_attached {
                true => 0,
                false => workers.map_or(1, |workers| usize::from(workers.get())),
            },
            isolation: match isolation.unwrap_or(IsolationKind::Thread) {
                IsolationKind::Thread => Isolation::Thread,
                IsolationKind::Process => Isolation::Process(worker_program(&name, arguments)?),
            },
            name,
            aliases,
            slots,
            queue_depth: usize::try_from(queue_depth.unwrap_or(1_024)).unwrap_or(usize::MAX),
            slow_reader_timeout: seconds(slow_reader, 10),
        })
    }

    /// Checks an attached model: it has no local workers, and it needs a name that its workers give when
    /// they connect.
    fn check_attached(&self, has_name: bool, origin: &Origin<'_>) -> Result<(), ConfigError> {
        let is_process = self.isolation == Some(IsolationKind::Process);
        let local_worker_settings = [
            ("workers", self.workers.is_some()),
            ("isolation", is_process),
        ];
        origin.reject_unused(&local_worker_settings, "for local workers only", "attached")?;
        if has_name {
            return Ok(());
        }
        let key = origin.name("model_name");
        Err(origin.error(format!(
            "{key} is required for the runner attached: its workers give this name when they connect"
        )))
    }
}

/// The command that runs this executable as a worker of the named model.
fn worker_program(name: &str, arguments: Vec<OsString>) -> Result<Program, ConfigError> {
    let path = std::env::current_exe().map_err(|error| {
        ConfigError::Invalid(format!(
            "--isolation process: could not find the path of this executable: {error}"
        ))
    })?;
    let command = ["worker", "--model", name].map(OsString::from);
    Ok(Program {
        path,
        arguments: command.into_iter().chain(arguments).collect(),
    })
}
