//! The runner `llama`: a GGUF model on llama.cpp.

use std::sync::Arc;

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::kind::KindSettings;
use crate::config::error::ConfigError;
use crate::config::settings::Settings;
use crate::config::values::{FilePath, Milliseconds, PositiveInteger};
use crate::runner::Loader;

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct LlamaSettings {
    /// Path of the model's GGUF file (llama only)
    #[arg(long, env = "TOKENWAY_MODEL_PATH", value_name = "FILE")]
    model_path: Option<FilePath>,
    /// Maximum number of tokens in one sequence, prompt plus completion (llama only) [default: the length
    /// that the model was trained on, but at most 2048]
    #[arg(long, env = "TOKENWAY_CONTEXT_LENGTH", value_name = "TOKENS")]
    context_length: Option<PositiveInteger<u32>>,
    /// Number of threads for computing the model (llama only) [default: the number of cores minus one]
    #[arg(long, env = "TOKENWAY_THREADS", value_name = "N")]
    threads: Option<PositiveInteger<u16>>,
    /// Start a sequence from prompt tokens that an earlier sequence has computed (llama only)
    #[arg(long, env = "TOKENWAY_PREFIX_CACHING", num_args = 0..=1, default_missing_value = "true",
        default_value = "true", action = ArgAction::Set)]
    prefix_caching: bool,
    /// Memory of each worker for the computed tokens of sequences that had to leave their slot, in MiB. 0 keeps
    /// computed tokens only in slots (llama only)
    #[arg(
        long,
        env = "TOKENWAY_PREFIX_CACHE_MIB",
        value_name = "MIB",
        default_value = "1024"
    )]
    prefix_cache_mib: u32,
    /// Time that a step with prompt tokens should take at most, in milliseconds. Running streams wait for the
    /// step; shorter steps compute a prompt more slowly. A step has at least 64 prompt tokens (llama only)
    #[arg(
        long,
        env = "TOKENWAY_MAX_STEP_MS",
        value_name = "MILLISECONDS",
        default_value = "500"
    )]
    max_step_ms: Milliseconds,
}

impl KindSettings for LlamaSettings {
    const NAME: &'static str = "llama";
    const HELP: &'static str = "GGUF model on llama.cpp";

    fn defaults(&self) -> Table {
        let path = self.model_path.as_ref().map(|path| &path.value);
        let name = path.and_then(|path| path.file_stem()).unwrap_or_default();
        Table::from_iter([
            (
                "model_name".to_owned(),
                name.to_string_lossy().into_owned().into(),
            ),
            ("slots".to_owned(), 8.into()),
            ("threads".to_owned(), i64::from(default_threads()).into()),
        ])
    }

    #[cfg(feature = "llama-cpp")]
    fn loader(self, settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError> {
        use crate::runner::llama::{LlamaLoader, LlamaOptions, MAX_SLOTS, check_file};

        let key = settings.name("model_path");
        let error = |problem| settings.error("model_path", problem);
        let Some(FilePath {
            value: model_path, ..
        }) = self.model_path
        else {
            return Err(error(format!(
                "{key} is required for --runner llama: give a GGUF file; `make model` downloads one"
            )));
        };
        check_file(&model_path).map_err(|problem| {
            let path = model_path.display();
            error(format!(
                "{key} {path}: {problem}; `make model` downloads one"
            ))
        })?;
        let slots = settings
            .values
            .get("slots")
            .and_then(toml::Value::as_integer);
        if let Some(slots) =
            slots.filter(|slots| usize::try_from(*slots).is_ok_and(|slots| slots > MAX_SLOTS))
        {
            let key = settings.name("slots");
            return Err(settings.error(
                "slots",
                format!("{key} must be at most {MAX_SLOTS} for --runner llama (got {slots})"),
            ));
        }
        Ok(Arc::new(LlamaLoader::new(LlamaOptions {
            model_path,
            threads: self
                .threads
                .map_or_else(|| default_threads().into(), usize::from),
            context_length: self.context_length.map(u32::from),
            prefix_caching: self.prefix_caching,
            prefix_cache_bytes: usize::try_from(self.prefix_cache_mib)
                .unwrap_or(usize::MAX)
                .saturating_mul(1024 * 1024),
            max_step: self.max_step_ms.into(),
        })))
    }

    #[cfg(not(feature = "llama-cpp"))]
    fn loader(self, settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError> {
        let key = settings.name("runner");
        let problem = format!(
            "{key}: this build does not include llama; `make build` builds it with llama.cpp"
        );
        Err(settings.error("runner", problem))
    }
}

/// Returns the number of CPU cores minus one. The last core is left for the HTTP and gRPC APIs.
fn default_threads() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    u16::try_from(cores.saturating_sub(1).max(1)).unwrap_or(u16::MAX)
}
