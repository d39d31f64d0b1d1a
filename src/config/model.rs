//! The settings of one model: what runs it, on how many workers, and how the test runner behaves.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::file::SettingsFile;
use super::values::{Count, Milliseconds, Seconds};
use super::{ConfigError, seconds};
use crate::request::MAX_MODEL_NAME_BYTES;
use crate::runner::Loader;
use crate::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use crate::server::ModelParts;

/// Which runner serves the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(try_from = "String")]
pub(super) enum RunnerKind {
    /// The reference's test runner: `token_0`, `token_1`, … at an exact cadence.
    #[value(name = "llm_test")]
    LlmTest,
    /// A GGUF model on llama.cpp.
    #[value(name = "llama")]
    Llama,
}

impl TryFrom<String> for RunnerKind {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::from_str(&name, false).map_err(|_| "it must be llm_test or llama")
    }
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ModelSettings {
    /// What runs the model [default: llama where --model-path is given, else llm_test]
    #[arg(long, env = "MODEL_RUNNER", value_name = "RUNNER")]
    runner: Option<RunnerKind>,
    /// The GGUF file of the model (llama)
    #[arg(long, env = "TOKENWAY_MODEL_PATH", value_name = "FILE")]
    model_path: Option<PathBuf>,
    /// The most tokens of one sequence, prompt and completion together (llama) [default: what the
    /// model was trained on, at most 2048]
    #[arg(long, env = "TOKENWAY_CONTEXT_LENGTH", value_name = "TOKENS")]
    context_length: Option<Count<u32>>,
    /// How many threads the model computes on (llama) [default: one less than there are cores]
    #[arg(long, env = "TOKENWAY_THREADS", value_name = "N")]
    threads: Option<Count<u16>>,
    /// How many workers load the model, each on a thread of its own [default: 1]
    #[arg(long, env = "TOKENWAY_WORKERS", value_name = "N")]
    workers: Option<Count<u16>>,
    /// How many sequences each worker runs at once [default: 1024 for llm_test, 8 for llama]
    #[arg(long, env = "TOKENWAY_SLOTS", value_name = "N")]
    slots: Option<Count<u16>>,
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
    #[command(flatten)]
    #[serde(flatten)]
    test_runner: TestRunnerSettings,
}

/// How the test runner behaves. What makes it misbehave is for tests of clients.
#[derive(Args, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
struct TestRunnerSettings {
    /// The time between two tokens of a sequence, in milliseconds; 0 is as fast as they are read
    /// (llm_test) [default: 20]
    #[arg(
        long,
        env = "TEST_RUNNER_FREQUENCY_MS",
        value_name = "MILLISECONDS",
        allow_negative_numbers = true
    )]
    test_runner_frequency_ms: Option<Milliseconds>,
    /// What the first token waits for besides, in milliseconds (llm_test) [default: 0]
    #[arg(
        long,
        env = "TEST_RUNNER_FIRST_TOKEN_DELAY_MS",
        value_name = "MILLISECONDS",
        allow_negative_numbers = true
    )]
    test_runner_first_token_delay_ms: Option<Milliseconds>,
    /// The index of the token before which every sequence falls silent (llm_test) [default: none]
    #[arg(long, env = "TEST_RUNNER_SILENT_AT", value_name = "INDEX")]
    test_runner_silent_at: Option<u32>,
    /// The index of the token in whose place every sequence fails (llm_test) [default: none]
    #[arg(long, env = "TEST_RUNNER_FAIL_AT", value_name = "INDEX")]
    test_runner_fail_at: Option<u32>,
    /// The index of the token in whose place the worker panics (llm_test) [default: none]
    #[arg(long, env = "TEST_RUNNER_PANIC_AT", value_name = "INDEX")]
    test_runner_panic_at: Option<u32>,
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
    fn refuse_unread(
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
            model_path: self.model_path.or(file.model_path),
            context_length: self.context_length.or(file.context_length),
            threads: self.threads.or(file.threads),
            workers: self.workers.or(file.workers),
            slots: self.slots.or(file.slots),
            queue_depth: self.queue_depth.or(file.queue_depth),
            slow_reader_timeout: self.slow_reader_timeout.or(file.slow_reader_timeout),
            test_runner: self.test_runner.or(file.test_runner),
        }
    }

    /// What a model takes from `every`, which holds for all models, where it does not say itself.
    pub(super) fn or_of_every_model(self, every: &Self) -> Self {
        Self {
            queue_depth: self.queue_depth.or(every.queue_depth),
            slow_reader_timeout: self.slow_reader_timeout.or(every.slow_reader_timeout),
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
        let runner = self.runner.unwrap_or(if self.model_path.is_some() {
            RunnerKind::Llama
        } else {
            RunnerKind::LlmTest
        });
        let (workers, slots) = (self.workers, self.slots);
        let (queue_depth, slow_reader) = (self.queue_depth, self.slow_reader_timeout);
        let (own_name, loader, default_slots) = match runner {
            RunnerKind::LlmTest => self.test_model(origin)?,
            RunnerKind::Llama => self.real_model(origin)?,
        };
        let name = name.unwrap_or(own_name);
        origin.check_name("model_name", &name)?;
        for alias in &aliases {
            origin.check_name("aliases", alias)?;
        }
        Ok(ModelParts {
            name,
            aliases,
            loader,
            workers: workers.map_or(1, count),
            slots: slots.map_or(default_slots, count),
            queue_depth: usize::try_from(queue_depth.unwrap_or(1_024)).unwrap_or(usize::MAX),
            slow_reader_timeout: seconds(slow_reader, 10),
        })
    }

    fn test_model(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let only_llama = [
            ("model_path", self.model_path.is_some()),
            ("context_length", self.context_length.is_some()),
            ("threads", self.threads.is_some()),
        ];
        origin.refuse_unread(&only_llama, "llama", "llm_test")?;
        let loader = TestRunnerLoader::new(self.test_runner.options());
        Ok((loader.name().to_owned(), Arc::new(loader), 1_024))
    }

    #[cfg(feature = "llama-cpp")]
    fn real_model(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        use crate::runner::llama::{LlamaLoader, LlamaOptions, MAX_SLOTS, check_file};

        let only_test = [(
            "test_runner_…",
            self.test_runner != TestRunnerSettings::default(),
        )];
        origin.refuse_unread(&only_test, "llm_test", "llama")?;
        let Some(model_path) = self.model_path else {
            let key = origin.name("model_path");
            return Err(origin.error(format!(
                "the runner llama needs {key}, a GGUF file; `make model` fetches one"
            )));
        };
        check_file(&model_path).map_err(|error| {
            let (key, path) = (origin.name("model_path"), model_path.display());
            origin.error(format!("{key} {path}: {error}; `make model` fetches one"))
        })?;
        if self.slots.is_some_and(|slots| count(slots) > MAX_SLOTS) {
            let key = origin.name("slots");
            return Err(origin.error(format!(
                "{key}: llama.cpp runs at most {MAX_SLOTS} sequences at once"
            )));
        }
        let file_name = model_path
            .file_stem()
            .map(|name| name.to_string_lossy().into_owned());
        let name = file_name.unwrap_or_default();
        let loader = LlamaLoader::new(LlamaOptions {
            model_path,
            threads: self.threads.map_or_else(super::default_threads, count),
            context_length: self.context_length.map(Count::get),
        });
        Ok((name, Arc::new(loader), 8))
    }

    #[cfg(not(feature = "llama-cpp"))]
    fn real_model(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let key = origin.name("runner");
        Err(origin.error(format!(
            "{key}: this build has no runner llama; `make build` makes one that has it"
        )))
    }
}

impl TestRunnerSettings {
    fn or(self, file: Self) -> Self {
        Self {
            test_runner_frequency_ms: self
                .test_runner_frequency_ms
                .or(file.test_runner_frequency_ms),
            test_runner_first_token_delay_ms: self
                .test_runner_first_token_delay_ms
                .or(file.test_runner_first_token_delay_ms),
            test_runner_silent_at: self.test_runner_silent_at.or(file.test_runner_silent_at),
            test_runner_fail_at: self.test_runner_fail_at.or(file.test_runner_fail_at),
            test_runner_panic_at: self.test_runner_panic_at.or(file.test_runner_panic_at),
        }
    }

    fn options(&self) -> TestRunnerOptions {
        let default = TestRunnerOptions::default();
        let or = |setting: Option<Milliseconds>, default| setting.map_or(default, Duration::from);
        TestRunnerOptions {
            interval: or(self.test_runner_frequency_ms, default.interval),
            first_token_delay: or(
                self.test_runner_first_token_delay_ms,
                default.first_token_delay,
            ),
            silent_at: self.test_runner_silent_at,
            fail_at: self.test_runner_fail_at,
            panic_at: self.test_runner_panic_at,
        }
    }
}

fn count(number: Count<u16>) -> usize {
    usize::from(number.get())
}
