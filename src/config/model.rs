//! Settings of one model: its names, its workers, its queue and its slow readers.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::error::ConfigError;
use super::runner::{RunnerKind, RunnerPlace, RunnerSettings, resolve, worker_values};
use super::settings::Settings;
use super::values::{PositiveInteger, Seconds};
use crate::request::MAX_MODEL_NAME_BYTES;
use crate::runner::Loader;
use crate::server::{Isolation, ModelParts};
use crate::worker::child::Program;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelSettings {
    /// Name by which requests select the model [default: llm_test; the model file's name without its
    /// extension; or, of a model on the Hugging Face Hub, OWNER/REPO or OWNER/REPO:QUANTIZATION]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Additional names of the model. Separate several with commas, or repeat the flag. Each must differ from
    /// the others and from --model-name [default: test for llm_test, otherwise none]
    #[arg(
        long,
        env = "TOKENWAY_MODEL_ALIAS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    model_alias: Option<Vec<String>>,
    #[command(flatten)]
    #[serde(flatten)]
    runner: RunnerSettings,
    /// Number of workers that the engine starts. Each loads the model. Not allowed with --runner attached
    /// [default: 1, or none with --runner attached]
    #[arg(
        long,
        env = "TOKENWAY_WORKERS",
        value_name = "N",
        help_heading = "Workers"
    )]
    workers: Option<PositiveInteger<u16>>,
    #[command(flatten)]
    #[serde(flatten)]
    shared: SharedSettings,
}

/// Settings of a model that are also allowed outside `[[model]]` tables. There they are the defaults of all models.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Queue and limits")]
pub(super) struct SharedSettings {
    /// Place of these workers: a thread of the engine, or a child process for each worker, whose crash does
    /// not affect the engine
    #[arg(
        long,
        env = "TOKENWAY_ISOLATION",
        value_name = "PLACE",
        default_value = "thread",
        help_heading = "Workers"
    )]
    isolation: IsolationKind,
    /// Maximum number of requests that wait for a slot. Further requests are rejected with the error
    /// `queue_full`. 0: no request waits
    #[arg(
        long,
        env = "TOKENWAY_QUEUE_DEPTH",
        value_name = "N",
        default_value = "1024"
    )]
    queue_depth: u32,
    /// Time in seconds after which a stream ends with an error if its client reads nothing
    #[arg(
        long,
        env = "TOKENWAY_SLOW_READER_TIMEOUT",
        value_name = "SECONDS",
        default_value = "10"
    )]
    slow_reader_timeout: Seconds,
}

/// The value of `--isolation`: threads or child processes for the workers that an engine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
enum IsolationKind {
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

/// Builds the parts of one model. Adds the defaults that depend on the model's runner to `settings`.
pub(super) fn model_parts(settings: &mut Settings) -> Result<ModelParts, ConfigError> {
    let model: ModelSettings = settings.get()?;
    if model.runner.kind().place == RunnerPlace::Remote {
        model.check_attached(settings)?;
    }
    let (kind, loader) = resolve(settings)?;
    if kind.place == RunnerPlace::Local {
        settings.set_default("workers", 1);
    }
    let model: ModelSettings = settings.get()?;
    model.model_parts(kind, loader, settings)
}

impl ModelSettings {
    fn model_parts(
        self,
        kind: RunnerKind,
        loader: Arc<dyn Loader>,
        settings: &Settings,
    ) -> Result<ModelParts, ConfigError> {
        let name = self.model_name.unwrap_or_default();
        let aliases = self.model_alias.unwrap_or_default();
        check_name("model_name", &name, settings)?;
        for alias in &aliases {
            check_name("model_alias", alias, settings)?;
        }
        let queue_depth = self.shared.queue_depth;
        Ok(ModelParts {
            loader,
            workers: self.workers.map_or(0, usize::from),
            isolation: match self.shared.isolation {
                IsolationKind::Thread => Isolation::Thread,
                IsolationKind::Process => {
                    Isolation::Process(worker_program(&name, worker_values(kind, settings))?)
                }
            },
            slots: self.runner.slots(),
            queue_depth: usize::try_from(queue_depth).unwrap_or(usize::MAX),
            slow_reader_timeout: self.shared.slow_reader_timeout.into(),
            name,
            aliases,
        })
    }

    /// Checks the settings of a model with `--runner attached`. Such a model has no local workers, and its name is
    /// required because remote workers connect with it.
    fn check_attached(&self, settings: &Settings) -> Result<(), ConfigError> {
        let local_worker_settings = [
            ("workers", self.workers.is_some()),
            ("isolation", self.shared.isolation == IsolationKind::Process),
        ];
        if let Some((key, _)) = local_worker_settings.iter().find(|(_, is_set)| *is_set) {
            let name = settings.name(key);
            let problem =
                format!("{name} applies to local workers only; the runner `attached` has none");
            return Err(settings.error(key, problem));
        }
        if self.model_name.is_some() {
            return Ok(());
        }
        let name = settings.name("model_name");
        let problem = format!(
            "{name} is required for --runner attached: workers give this name when they connect"
        );
        Err(settings.error("model_name", problem))
    }
}

/// Rejects an empty or overlong model name, which no request could use.
pub(super) fn check_name(key: &str, name: &str, settings: &Settings) -> Result<(), ConfigError> {
    let setting = settings.name(key);
    let problem = if name.is_empty() {
        format!("{setting} must not be empty: requests select the model by this name")
    } else if name.len() > MAX_MODEL_NAME_BYTES {
        let length = name.len();
        format!("{setting} must be at most {MAX_MODEL_NAME_BYTES} bytes long (got {length})")
    } else {
        return Ok(());
    };
    Err(settings.error(key, problem))
}

/// Returns the command that starts this executable as a worker process for the named model.
fn worker_program(name: &str, mut values: Table) -> Result<Program, ConfigError> {
    let path = std::env::current_exe().map_err(|error| {
        ConfigError::Invalid(format!(
            "--isolation process: could not find the path of this executable: {error}"
        ))
    })?;
    values.insert("model_name".to_owned(), name.into());
    Ok(Program {
        path,
        arguments: ["worker", "--settings-from-stdin"].map(Into::into).to_vec(),
        settings: values.to_string(),
    })
}
