//! The settings of the test runner `llm_test`, including the faults that tests of clients inject.

use std::sync::Arc;

use clap::Args;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::kind::KindSettings;
use crate::config::error::ConfigError;
use crate::config::settings::Settings;
use crate::config::values::Milliseconds;
use crate::runner::Loader;
use crate::runner::llm_test::{LLM_TEST, TestRunnerLoader, TestRunnerOptions};

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Test runner")]
pub(super) struct TestRunnerSettings {
    /// Time in milliseconds between two tokens of a sequence. 0: as fast as the client reads (llm_test only)
    #[arg(
        long,
        env = "TEST_RUNNER_FREQUENCY_MS",
        value_name = "MILLISECONDS",
        default_value = "20"
    )]
    test_runner_frequency_ms: Milliseconds,
    /// Extra delay of the first token, in milliseconds (llm_test only)
    #[arg(
        long,
        env = "TEST_RUNNER_FIRST_TOKEN_DELAY_MS",
        value_name = "MILLISECONDS",
        default_value = "0"
    )]
    test_runner_first_token_delay_ms: Milliseconds,
    /// Extra delay of the first token for each prompt token that no earlier sequence has computed, in milliseconds. 0:
    /// no delay, and sequences reuse no prompt tokens (llm_test only)
    #[arg(
        long,
        env = "TEST_RUNNER_PROMPT_TOKEN_DELAY_MS",
        value_name = "MILLISECONDS",
        default_value = "0"
    )]
    test_runner_prompt_token_delay_ms: Milliseconds,
    /// Stall every sequence before the token with this index: it stays open but emits nothing more. The first
    /// token has index 0 (llm_test only) [default: never]
    #[arg(long, env = "TEST_RUNNER_SILENT_AT", value_name = "INDEX")]
    test_runner_silent_at: Option<u32>,
    /// Fail every sequence in place of the token with this index. The first token has index 0 (llm_test only)
    /// [default: never]
    #[arg(long, env = "TEST_RUNNER_FAIL_AT", value_name = "INDEX")]
    test_runner_fail_at: Option<u32>,
    /// Panic in place of the token with this index, so that the worker loses all sequences. The first token has
    /// index 0 (llm_test only) [default: never]
    #[arg(long, env = "TEST_RUNNER_PANIC_AT", value_name = "INDEX")]
    test_runner_panic_at: Option<u32>,
}

impl KindSettings for TestRunnerSettings {
    const NAME: &'static str = LLM_TEST;
    const HELP: &'static str =
        "Test runner of the reference system: emits `token_0`, `token_1`, … at a fixed interval";

    fn defaults(&self) -> Table {
        Table::from_iter([
            ("model_name".to_owned(), LLM_TEST.into()),
            ("slots".to_owned(), 1_024.into()),
        ])
    }

    fn loader(self, _settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError> {
        Ok(Arc::new(TestRunnerLoader::new(TestRunnerOptions {
            interval: self.test_runner_frequency_ms.into(),
            first_token_delay: self.test_runner_first_token_delay_ms.into(),
            prompt_token_delay: self.test_runner_prompt_token_delay_ms.into(),
            silent_at: self.test_runner_silent_at,
            fail_at: self.test_runner_fail_at,
            panic_at: self.test_runner_panic_at,
        })))
    }
}
