//! Settings of a runner: its kind, model file, slots, and the test runner's behaviour. An engine has them
//! for each model; a worker has them for its own model.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::ConfigError;
use super::model::Origin;
use super::values::{Count, Milliseconds};
use crate::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use crate::runner::{LoadError, LoadedModel, Loader};

/// Kind of runner, the value of `--runner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(try_from = "String")]
pub(super) enum RunnerKind {
    /// Test runner of the reference system: emits `token_0`, `token_1`, … at a fixed interval.
    #[value(name = "llm_test")]
    LlmTest,
    /// GGUF model on llama.cpp.
    #[value(name = "llama")]
    Llama,
    /// No local runner: remote workers connect and serve the model.
    #[value(name = "attached")]
    Attached,
}

impl TryFrom<String> for RunnerKind {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::from_str(&name, false).map_err(|_| "must be llm_test, llama or attached")
    }
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct RunnerSettings {
    /// Runner of the model [default: llama if --model-path is set, otherwise llm_test]
    #[arg(long, env = "MODEL_RUNNER", value_name = "RUNNER")]
    runner: Option<RunnerKind>,
    /// Path of the model's GGUF file (llama only)
    #[arg(long, env = "TOKENWAY_MODEL_PATH", value_name = "FILE")]
    model_path: Option<PathBuf>,
    /// Maximum number of tokens in one sequence, prompt plus completion (llama only) [default: the length
    /// that the model was trained on, but at most 2048]
    #[arg(long, env = "TOKENWAY_CONTEXT_LENGTH", value_name = "TOKENS")]
    context_length: Option<Count<u32>>,
    /// Number of threads for computing the model (llama only) [default: the number of cores minus one]
    #[arg(long, env = "TOKENWAY_THREADS", value_name = "N")]
    threads: Option<Count<u16>>,
    /// Number of sequences that each worker runs at the same time [default: 1024 for llm_test, 8 for llama]
    #[arg(long, env = "TOKENWAY_SLOTS", value_name = "N")]
    slots: Option<Count<u16>>,
    #[command(flatten)]
    #[serde(flatten)]
    test_runner: TestRunnerSettings,
}

/// Behaviour of the test runner. The faults are for tests of clients.
#[derive(Args, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
struct TestRunnerSettings {
    /// Time in milliseconds between two tokens of a sequence. 0: as fast as the client reads (llm_test only)
    /// [default: 20]
    #[arg(
        long,
        env = "TEST_RUNNER_FREQUENCY_MS",
        value_name = "MILLISECONDS",
        allow_negative_numbers = true
    )]
    test_runner_frequency_ms: Option<Milliseconds>,
    /// Extra delay of the first token, in milliseconds (llm_test only) [default: 0]
    #[arg(
        long,
        env = "TEST_RUNNER_FIRST_TOKEN_DELAY_MS",
        value_name = "MILLISECONDS",
        allow_negative_numbers = true
    )]
    test_runner_first_token_delay_ms: Option<Milliseconds>,
    /// Stop every sequence, without ending it, before the token with this index, from 0 (llm_test only)
    /// [default: never]
    #[arg(long, env = "TEST_RUNNER_SILENT_AT", value_name = "INDEX")]
    test_runner_silent_at: Option<u32>,
    /// Fail every sequence in place of the token with this index, from 0 (llm_test only) [default: never]
    #[arg(long, env = "TEST_RUNNER_FAIL_AT", value_name = "INDEX")]
    test_runner_fail_at: Option<u32>,
    /// Panic in place of the token with this index, from 0, so that the worker loses all its sequences
    /// (llm_test only) [default: never]
    #[arg(long, env = "TEST_RUNNER_PANIC_AT", value_name = "INDEX")]
    test_runner_panic_at: Option<u32>,
}

/// A model's loader, and the defaults that depend on the runner.
pub(super) struct LoaderSettings {
    /// Name of the model if the settings give none.
    pub(super) default_name: String,
    pub(super) loader: Arc<dyn Loader>,
    /// Number of sequences that each worker runs at the same time.
    pub(super) slots: usize,
}

impl RunnerSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            runner: self.runner.or(file.runner),
            model_path: self.model_path.or(file.model_path),
            context_length: self.context_length.or(file.context_length),
            threads: self.threads.or(file.threads),
            slots: self.slots.or(file.slots),
            test_runner: self.test_runner.or(file.test_runner),
        }
    }

    /// Returns true if all workers are remote and the engine starts none.
    pub(super) fn is_attached(&self) -> bool {
        self.runner == Some(RunnerKind::Attached)
    }

    fn kind(&self) -> RunnerKind {
        let by_path = if self.model_path.is_some() {
            RunnerKind::Llama
        } else {
            RunnerKind::LlmTest
        };
        self.runner.unwrap_or(by_path)
    }

    /// Builds the model's loader.
    pub(super) fn loader(self, origin: &Origin<'_>) -> Result<LoaderSettings, ConfigError> {
        let slots = self.slots;
        let (default_name, loader, default_slots) = match self.kind() {
            RunnerKind::LlmTest => self.test_loader(origin)?,
            RunnerKind::Llama => self.llama_loader(origin)?,
            RunnerKind::Attached => self.attached_loader(origin)?,
        };
        Ok(LoaderSettings {
            default_name,
            loader,
            slots: slots.map_or(default_slots, count),
        })
    }

    /// The flags that give a worker process the same settings.
    pub(super) fn worker_arguments(&self) -> Vec<OsString> {
        let runner = match self.kind() {
            RunnerKind::LlmTest => "llm_test",
            RunnerKind::Llama => "llama",
            RunnerKind::Attached => "attached",
        };
        let mut arguments = Arguments(Vec::new());
        arguments.add("runner", Some(runner));
        arguments.add("model-path", self.model_path.as_ref());
        let context_length = self.context_length.map(|it| it.get().to_string());
        arguments.add("context-length", context_length);
        arguments.add("threads", self.threads.map(|it| it.get().to_string()));
        arguments.add("slots", self.slots.map(|it| it.get().to_string()));
        self.test_runner.add_to(&mut arguments);
        arguments.0
    }

    /// The loader of a model whose workers are all remote and bring their own runner.
    fn attached_loader(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let worker_settings = [
            ("model_path", self.model_path.is_some()),
            ("context_length", self.context_length.is_some()),
            ("threads", self.threads.is_some()),
            ("slots", self.slots.is_some()),
            (
                "test_runner_…",
                self.test_runner != TestRunnerSettings::default(),
            ),
        ];
        origin.reject_unused(
            &worker_settings,
            "a setting of `tokenway worker`",
            "attached",
        )?;
        Ok((String::new(), Arc::new(AttachedLoader), 1))
    }

    fn test_loader(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let only_llama = [
            ("model_path", self.model_path.is_some()),
            ("context_length", self.context_length.is_some()),
            ("threads", self.threads.is_some()),
        ];
        origin.reject_unused(&only_llama, "for the runner llama only", "llm_test")?;
        let loader = TestRunnerLoader::new(self.test_runner.options());
        Ok((loader.name().to_owned(), Arc::new(loader), 1_024))
    }

    #[cfg(feature = "llama-cpp")]
    fn llama_loader(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        use crate::runner::llama::{LlamaLoader, LlamaOptions, MAX_SLOTS, check_file};

        let only_test = [(
            "test_runner_…",
            self.test_runner != TestRunnerSettings::default(),
        )];
        origin.reject_unused(&only_test, "for the runner llm_test only", "llama")?;
        let Some(model_path) = self.model_path else {
            let key = origin.name("model_path");
            return Err(origin.error(format!(
                "{key} is required for --runner llama: give a GGUF file; `make model` downloads one"
            )));
        };
        check_file(&model_path).map_err(|error| {
            let (key, path) = (origin.name("model_path"), model_path.display());
            origin.error(format!("{key} {path}: {error}; `make model` downloads one"))
        })?;
        if let Some(slots) = self.slots.map(count).filter(|slots| *slots > MAX_SLOTS) {
            let key = origin.name("slots");
            return Err(origin.error(format!(
                "{key} must be at most {MAX_SLOTS} for --runner llama (got {slots})"
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
    fn llama_loader(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let key = origin.name("runner");
        Err(origin.error(format!(
            "{key}: this build does not include llama; `make build` builds it with llama.cpp"
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

    fn add_to(self, arguments: &mut Arguments) {
        let milliseconds = |it: Milliseconds| (Duration::from(it).as_secs_f64() * 1e3).to_string();
        let (frequency, delay) = (
            self.test_runner_frequency_ms.map(milliseconds),
            self.test_runner_first_token_delay_ms.map(milliseconds),
        );
        arguments.add("test-runner-frequency-ms", frequency);
        arguments.add("test-runner-first-token-delay-ms", delay);
        for (flag, index) in [
            ("test-runner-silent-at", self.test_runner_silent_at),
            ("test-runner-fail-at", self.test_runner_fail_at),
            ("test-runner-panic-at", self.test_runner_panic_at),
        ] {
            arguments.add(flag, index.map(|index| index.to_string()));
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

/// Command-line flags with their values.
struct Arguments(Vec<OsString>);

impl Arguments {
    /// Adds a flag if it has a value.
    fn add(&mut self, flag: &str, value: Option<impl AsRef<OsStr>>) {
        if let Some(value) = value {
            self.0.push(format!("--{flag}").into());
            self.0.push(value.as_ref().into());
        }
    }
}

/// The loader of an attached model, which loads nothing: its workers are remote.
struct AttachedLoader;

impl Loader for AttachedLoader {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        Err(LoadError(
            "the model has only remote workers; the engine cannot load it".to_owned(),
        ))
    }

    fn name(&self) -> &'static str {
        "attached"
    }
}

fn count(number: Count<u16>) -> usize {
    usize::from(number.get())
}
