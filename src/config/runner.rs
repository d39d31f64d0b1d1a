//! The settings of what runs a model: which runner, on which file, with how many slots, and how the test runner
//! behaves. An engine has them for each model, and a worker for its own.

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
    /// Whatever the workers run that dial in for the model.
    #[value(name = "attached")]
    Attached,
}

impl TryFrom<String> for RunnerKind {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::from_str(&name, false).map_err(|_| "it must be llm_test, llama or attached")
    }
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct RunnerSettings {
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
    /// How many sequences each worker runs at once [default: 1024 for llm_test, 8 for llama]
    #[arg(long, env = "TOKENWAY_SLOTS", value_name = "N")]
    slots: Option<Count<u16>>,
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

/// What loads a model.
pub(super) struct Loading {
    /// The name that the model has where nobody gives it one.
    pub(super) own_name: String,
    pub(super) loader: Arc<dyn Loader>,
    /// How many sequences each worker runs at once.
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

    /// Whether the workers all dial in, and the engine starts none.
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

    /// What loads the model.
    pub(super) fn loading(self, origin: &Origin<'_>) -> Result<Loading, ConfigError> {
        let slots = self.slots;
        let (own_name, loader, default_slots) = match self.kind() {
            RunnerKind::LlmTest => self.test_model(origin)?,
            RunnerKind::Llama => self.real_model(origin)?,
            RunnerKind::Attached => self.attached_model(origin)?,
        };
        Ok(Loading {
            own_name,
            loader,
            slots: slots.map_or(default_slots, count),
        })
    }

    /// What tells a worker in a process of its own to run the model in the same way.
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

    /// A model whose workers all dial in, and say themselves what they run.
    fn attached_model(
        self,
        origin: &Origin<'_>,
    ) -> Result<(String, Arc<dyn Loader>, usize), ConfigError> {
        let of_own_workers = [
            ("model_path", self.model_path.is_some()),
            ("context_length", self.context_length.is_some()),
            ("threads", self.threads.is_some()),
            ("slots", self.slots.is_some()),
            (
                "test_runner_…",
                self.test_runner != TestRunnerSettings::default(),
            ),
        ];
        origin.reject_unused(&of_own_workers, "of a worker", "attached")?;
        Ok((String::new(), Arc::new(Attached), 1))
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
        origin.reject_unused(&only_llama, "llama", "llm_test")?;
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
        origin.reject_unused(&only_test, "llm_test", "llama")?;
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

/// Flags with their values.
struct Arguments(Vec<OsString>);

impl Arguments {
    /// Adds a flag, where it has a value.
    fn add(&mut self, flag: &str, value: Option<impl AsRef<OsStr>>) {
        if let Some(value) = value {
            self.0.push(format!("--{flag}").into());
            self.0.push(value.as_ref().into());
        }
    }
}

/// Stands for what the workers run that dial in.
struct Attached;

impl Loader for Attached {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        Err(LoadError(
            "its workers dial in; the engine starts none".to_owned(),
        ))
    }

    fn name(&self) -> &'static str {
        "attached"
    }
}

fn count(number: Count<u16>) -> usize {
    usize::from(number.get())
}
