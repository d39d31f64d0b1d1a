//! The settings of one model: on how many workers it runs, where these are, and what becomes of its requests.

use std::ffi::OsString;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::file::SettingsFile;
use super::runner::{Loading, RunnerSettings};
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
    /// How many workers the engine starts, each of which loads the model [default: 1, or none for attached]
    #[arg(long, env = "TOKENWAY_WORKERS", value_name = "N")]
    workers: Option<Count<u16>>,
    /// Where these workers run: each on a thread of the engine, or each in a process of its own, which may die
    /// without the engine [default: thread]
    #[arg(long, env = "TOKENWAY_ISOLATION", value_name = "PLACE")]
    isolation: Option<IsolationKind>,
    /// How many requests may wait for a slot; the next is refused [default: 1024]
    #[arg(long, env = "TOKENWAY_QUEUE_DEPTH", value_name = "N")]
    queue_depth: Option<u32>,
    /// How long a reader may make no progress before its stream is given up, in seconds [default: 10]
    #[arg(
        long,
        env = "TOKENWAY_SLOW_READER_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    slow_reader_timeout: Option<Seconds>,
}

/// Where an engine's own workers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(try_from = "String")]
pub(super) enum IsolationKind {
    /// Each on a thread of the engine.
    Thread,
    /// Each in a process of its own.
    Process,
}

impl TryFrom<String> for IsolationKind {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::from_str(&name, false).map_err(|_| "it must be thread or process")
    }
}

/// Where a model's settings stand, by which errors name them.
pub(super) enum Origin<'a> {
    /// Among the flags, or what stands for them.
    Flags,
    /// In this table of the settings file, counted from 1.
    Table(&'a SettingsFile, usize),
}

impl Origin<'_> {
    /// A setting as its operator wrote it.
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

    /// Refuses a name that no request could give.
    pub(super) fn check_name(&self, key: &str, name: &str) -> Result<(), ConfigError> {
        let key = self.name(key);
        if name.is_empty() {
            let problem = format!("{key} must not be empty: requests name the model by it");
            return Err(self.error(problem));
        }
        if name.len() > MAX_MODEL_NAME_BYTES {
            let problem = format!("{key} must be at most {MAX_MODEL_NAME_BYTES} bytes");
            return Err(self.error(problem));
        }
        Ok(())
    }

    /// Refuses settings that the chosen runner would not read: whoever gave them meant another.
    pub(super) fn reject_unused(
        &self,
        settings: &[(&str, bool)],
        reader: &str,
        runner: &str,
    ) -> Result<(), ConfigError> {
        match settings.iter().find(|(_, is_set)| *is_set) {
            None => Ok(()),
            Some((key, _)) => Err(self.error(format!(
                "{} is for the runner {reader}, but the runner is {runner}",
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

    /// What a model takes from `every`, which holds for all models, where it does not say itself.
    pub(super) fn or_of_every_model(self, every: &Self) -> Self {
        Self {
            queue_depth: self.queue_depth.or(every.queue_depth),
            slow_reader_timeout: self.slow_reader_timeout.or(every.slow_reader_timeout),
            isolation: self.isolation.or(every.isolation),
            ..self
        }
    }

    /// The model under this name, or under its runner's own.
    pub(super) fn parts(
        self,
        name: Option<String>,
        aliases: Vec<String>,
        origin: &Origin<'_>,
    ) -> Result<ModelParts, ConfigError> {
        let is_attached = self.runner.is_attached();
        if is_attached {
            self.reject_local_worker_settings(name.is_some(), origin)?;
        }
        let (workers, isolation) = (self.workers, self.isolation);
        let (queue_depth, slow_reader) = (self.queue_depth, self.slow_reader_timeout);
        let arguments = self.runner.worker_arguments();
        let Loading {
            own_name,
            loader,
            slots,
        } = self.runner.loading(origin)?;
        let name = name.unwrap_or(own_name);
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

    /// A model whose workers all dial in has none of the engine's own, and a name by which they dial.
    fn reject_local_worker_settings(
        &self,
        has_name: bool,
        origin: &Origin<'_>,
    ) -> Result<(), ConfigError> {
        let is_process = self.isolation == Some(IsolationKind::Process);
        let of_own_workers = [
            ("workers", self.workers.is_some()),
            ("isolation", is_process),
        ];
        origin.reject_unused(&of_own_workers, "of an engine's own workers", "attached")?;
        if has_name {
            return Ok(());
        }
        let key = origin.name("model_name");
        let problem = format!("the runner attached needs {key}: workers dial in for it by this");
        Err(origin.error(problem))
    }
}

/// This program as a worker of the model of this name.
fn worker_program(name: &str, arguments: Vec<OsString>) -> Result<Program, ConfigError> {
    let path = std::env::current_exe().map_err(|error| {
        ConfigError::Invalid(format!(
            "--isolation process: where this program is cannot be told: {error}"
        ))
    })?;
    let own = ["worker", "--model", name].map(OsString::from);
    Ok(Program {
        path,
        arguments: own.into_iter().chain(arguments).collect(),
    })
}
