//! The runner `llama`: a GGUF model on llama.cpp.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::kind::KindSettings;
use crate::config::error::ConfigError;
use crate::config::settings::Settings;
use crate::config::values::{FilePath, Milliseconds, ParsedText, PositiveInteger};
use crate::gguf_name::model_stem;
use crate::hub::{HUB_PREFIX, HubModel};
use crate::runner::Loader;
use crate::server::run::ModelFiles;

/// Key of the setting that names a GGUF file or a model on the Hub.
pub(super) const MODEL_KEY: &str = "model";

/// Key of the setting that names a GGUF file.
pub(super) const MODEL_PATH_KEY: &str = "model_path";

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct LlamaSettings {
    /// Model to run: the path of a GGUF file (of a split model, the first file), or `hf:OWNER/REPO`,
    /// `hf:OWNER/REPO:QUANTIZATION` or `hf:OWNER/REPO:FILE.gguf` for a model on the Hugging Face Hub, which is
    /// downloaded once (llama only)
    #[arg(long, env = "TOKENWAY_MODEL", value_name = "MODEL")]
    model: Option<ParsedText<ModelSource>>,
    /// Path of the model's GGUF file, the same as --model FILE (llama only)
    #[arg(long, env = "TOKENWAY_MODEL_PATH", value_name = "FILE")]
    model_path: Option<FilePath>,
    /// Maximum number of tokens in one sequence, prompt plus completion (llama only) [default: the length
    /// that the model was trained on, but at most 2048]
    #[arg(long, env = "TOKENWAY_CONTEXT_LENGTH", value_name = "TOKENS")]
    context_length: Option<PositiveInteger<u32>>,
    /// Number of threads for computing the model (llama only) [default: the number of cores minus one]
    #[arg(long, env = "TOKENWAY_THREADS", value_name = "N")]
    threads: Option<PositiveInteger<u16>>,
    /// Number of threads for computing prompts (llama only) [default: the value of --threads]
    #[arg(long, env = "TOKENWAY_THREADS_BATCH", value_name = "N")]
    threads_batch: Option<PositiveInteger<u16>>,
    /// Names of the GPUs that hold the model, separated by commas, such as CUDA0,CUDA1 (llama only)
    /// [default: all GPUs that the build supports]
    #[arg(long, env = "TOKENWAY_DEVICES", value_name = "NAMES")]
    devices: Option<String>,
    /// Number of layers that GPUs hold; the CPU holds the others. 0 uses the CPU only (llama only)
    /// [default: all layers, if there is a GPU]
    #[arg(long, env = "TOKENWAY_GPU_LAYERS", value_name = "N")]
    gpu_layers: Option<u32>,
    /// Use of flash attention: `on`, `off`, or `auto` (on if the device supports it) (llama only)
    #[arg(
        long,
        env = "TOKENWAY_FLASH_ATTENTION",
        value_name = "USE",
        default_value = "auto"
    )]
    flash_attention: String,
    /// Type of the keys in the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (llama only)
    #[arg(
        long,
        env = "TOKENWAY_CACHE_TYPE_K",
        value_name = "TYPE",
        default_value = "f16"
    )]
    cache_type_k: String,
    /// Type of the values in the KV cache. Quantized types need flash attention (llama only)
    #[arg(
        long,
        env = "TOKENWAY_CACHE_TYPE_V",
        value_name = "TYPE",
        default_value = "f16"
    )]
    cache_type_v: String,
    /// Start a sequence from prompt tokens that an earlier sequence has computed (llama only)
    #[arg(long, env = "TOKENWAY_PREFIX_CACHING", num_args = 0..=1, default_missing_value = "true",
        default_value = "true", action = ArgAction::Set)]
    prefix_caching: bool,
    /// Memory of each worker for the computed tokens of sequences whose slot another sequence took, in MiB. 0 keeps
    /// computed tokens only in slots (llama only)
    #[arg(
        long,
        env = "TOKENWAY_PREFIX_CACHE_MIB",
        value_name = "MIB",
        default_value = "1024"
    )]
    prefix_cache_mib: u32,
    /// Maximum time that a step with prompt tokens should take, in milliseconds. Running streams wait for the
    /// step; shorter steps compute a prompt more slowly. A long prompt is computed in parts of at least 128
    /// tokens, even if a part takes longer (llama only)
    #[arg(
        long,
        env = "TOKENWAY_MAX_STEP_MS",
        value_name = "MILLISECONDS",
        default_value = "700"
    )]
    max_step_ms: Milliseconds,
}

impl KindSettings for LlamaSettings {
    const NAME: &'static str = "llama";
    const HELP: &'static str = "GGUF model on llama.cpp";

    fn defaults(&self) -> Table {
        let model = self.model.as_ref().map(|model| &model.value);
        let name = match (model, &self.model_path) {
            (Some(ModelSource::Hub(model)), _) => model.default_name(),
            (Some(ModelSource::File(path)), _) | (None, Some(FilePath { value: path, .. })) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                model_stem(&name).to_owned()
            }
            (None, None) => String::new(),
        };
        Table::from_iter([
            ("model_name".to_owned(), name.into()),
            ("slots".to_owned(), 8.into()),
            ("threads".to_owned(), i64::from(default_threads()).into()),
        ])
    }

    #[cfg(feature = "llama-cpp")]
    fn loader(self, settings: &Settings) -> Result<Arc<dyn Loader>, ConfigError> {
        use crate::runner::llama::{FlashAttention, LlamaLoader, LlamaOptions};

        check_slots(settings)?;
        let source = self.model_file(settings)?;
        let options = LlamaOptions {
            model_path: match &source {
                ModelSource::File(path) => path.clone(),
                // Before the download, the options are only checked.
                ModelSource::Hub(_) => PathBuf::new(),
            },
            threads: self
                .threads
                .map_or_else(|| default_threads().into(), usize::from),
            threads_batch: self.threads_batch.map(usize::from),
            context_length: self.context_length.map(u32::from),
            devices: self.device_names(settings)?,
            gpu_layers: self.checked_gpu_layers(settings)?,
            flash_attention: parse("flash_attention", &self.flash_attention, settings)?,
            cache_type_k: parse("cache_type_k", &self.cache_type_k, settings)?,
            cache_type_v: parse("cache_type_v", &self.cache_type_v, settings)?,
            prefix_caching: self.prefix_caching,
            prefix_cache_bytes: usize::try_from(self.prefix_cache_mib)
                .unwrap_or(usize::MAX)
                .saturating_mul(1024 * 1024),
            max_step: self.max_step_ms.into(),
        };
        if options.flash_attention == FlashAttention::Off && options.cache_type_v.is_quantized() {
            let [key, flash_attention] =
                ["cache_type_v", "flash_attention"].map(|key| settings.name(key));
            let value = &self.cache_type_v;
            let problem =
                format!("{key} {value} needs flash attention, but {flash_attention} is off");
            return Err(settings.error("cache_type_v", problem));
        }
        Ok(match source {
            ModelSource::File(_) => Arc::new(LlamaLoader::new(options)),
            ModelSource::Hub(_) => Arc::new(NotDownloaded),
        })
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

/// True if this build includes a GPU backend of llama.cpp.
#[cfg(feature = "llama-cpp")]
const HAS_GPU_SUPPORT: bool = cfg!(any(
    feature = "cuda",
    feature = "metal",
    feature = "rocm",
    feature = "vulkan"
));

/// Returns the error for a setting that needs a GPU.
#[cfg(feature = "llama-cpp")]
fn no_gpu_support(key: &str, settings: &Settings) -> ConfigError {
    let name = settings.name(key);
    let problem = format!(
        "{name} needs a build with GPU support; build Tokenway with the feature cuda, metal, rocm or vulkan, or leave \
         {name} out"
    );
    settings.error(key, problem)
}

/// Parses the value of a setting whose type exists only in builds with llama.cpp.
#[cfg(feature = "llama-cpp")]
fn parse<T: FromStr<Err = String>>(
    key: &str,
    text: &str,
    settings: &Settings,
) -> Result<T, ConfigError> {
    text.parse().map_err(|problem: String| {
        let name = settings.name(key);
        settings.error(key, format!("{name} {problem} (got '{text}')"))
    })
}

impl LlamaSettings {
    #[cfg(feature = "llama-cpp")]
    fn device_names(&self, settings: &Settings) -> Result<Vec<String>, ConfigError> {
        let names = self.devices.iter().flat_map(|names| names.split(','));
        let names: Vec<_> = names.map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            let problem = format!("{} has an empty name", settings.name("devices"));
            return Err(settings.error("devices", problem));
        }
        match names.is_empty() || HAS_GPU_SUPPORT {
            true => Ok(names),
            false => Err(no_gpu_support("devices", settings)),
        }
    }

    #[cfg(feature = "llama-cpp")]
    fn checked_gpu_layers(&self, settings: &Settings) -> Result<Option<u32>, ConfigError> {
        match self.gpu_layers {
            Some(1..) if !HAS_GPU_SUPPORT => Err(no_gpu_support("gpu_layers", settings)),
            layers => Ok(layers),
        }
    }

    /// Returns the model to load. Checks a file, so that a wrong path is reported before anything starts.
    #[cfg(feature = "llama-cpp")]
    fn model_file(&self, settings: &Settings) -> Result<ModelSource, ConfigError> {
        use crate::runner::llama::check_file;

        let (model, path) = (settings.is_set(MODEL_KEY), settings.is_set(MODEL_PATH_KEY));
        let key = if path { MODEL_PATH_KEY } else { MODEL_KEY };
        let name = settings.name(key);
        let error = |problem| Err(settings.error(key, problem));
        if model && path {
            let model = settings.name(MODEL_KEY);
            return error(format!("{name} and {model} are both set; remove {name}"));
        }
        let source = match (&self.model, &self.model_path) {
            // If both are there, `use_downloaded` has added the path of the downloaded file.
            (_, Some(path)) => ModelSource::File(path.value.clone()),
            (Some(model), None) => model.value.clone(),
            (None, None) => {
                return error(format!(
                    "{name} is required for --runner llama: give a GGUF file, or {HUB_PREFIX}OWNER/REPO:QUANTIZATION \
                     to download a model; `make model` downloads a small one"
                ));
            }
        };
        if let ModelSource::File(path) = &source
            && let Err(problem) = check_file(path)
        {
            let path = path.display();
            let advice = match hub_model(settings) {
                Some(model) => {
                    let folder = model.repo().replace('/', "--");
                    format!(
                        "choose another model; if the cached file is damaged, delete the folder models--{folder} in the \
                         cache and start again"
                    )
                }
                None => format!(
                    "give a GGUF file, or {HUB_PREFIX}OWNER/REPO:QUANTIZATION to download a model"
                ),
            };
            return error(format!("{name} {path}: {problem}; {advice}"));
        }
        Ok(source)
    }
}

/// Checks that llama.cpp can run this many sequences at once.
#[cfg(feature = "llama-cpp")]
fn check_slots(settings: &Settings) -> Result<(), ConfigError> {
    use crate::runner::llama::MAX_SLOTS;

    let slots = settings.values.get("slots");
    let slots = slots.and_then(toml::Value::as_integer);
    let too_many = slots.filter(|it| usize::try_from(*it).is_ok_and(|slots| slots > MAX_SLOTS));
    let Some(slots) = too_many else {
        return Ok(());
    };
    let name = settings.name("slots");
    let problem = format!("{name} must be at most {MAX_SLOTS} for --runner llama (got {slots})");
    Err(settings.error("slots", problem))
}

/// A model to load: a file, or a model on the Hub that is not downloaded yet.
#[derive(Clone, Debug)]
enum ModelSource {
    /// A GGUF file.
    File(PathBuf),
    /// A model on the Hugging Face Hub.
    Hub(HubModel),
}

impl FromStr for ModelSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.starts_with(HUB_PREFIX) {
            true => text.parse().map(Self::Hub),
            false => Ok(Self::File(text.into())),
        }
    }
}

/// Returns the model on the Hub that these settings name. `None` if they name none.
pub(in crate::config) fn hub_model(settings: &Settings) -> Option<HubModel> {
    let model = settings.values.get(MODEL_KEY)?.as_str()?;
    model.parse().ok()
}

/// Adds the path of the downloaded file to the settings of a model on the Hub.
pub(in crate::config) fn use_downloaded(settings: &mut Settings, files: &ModelFiles) {
    let Some(model) = hub_model(settings) else {
        return;
    };
    if let Some(path) = files.get(&model) {
        let path = path.to_string_lossy().into_owned();
        settings
            .values
            .insert(MODEL_PATH_KEY.to_owned(), path.into());
    }
}

/// The loader of a model that is not downloaded yet. It exists only so that the other settings can be checked before
/// the download. It never loads a model.
#[cfg(feature = "llama-cpp")]
struct NotDownloaded;

#[cfg(feature = "llama-cpp")]
impl Loader for NotDownloaded {
    fn load(
        &self,
        _slots: usize,
        _progress: &dyn Fn(f32),
    ) -> Result<crate::runner::LoadedModel, crate::runner::LoadError> {
        Err(crate::runner::LoadError(
            "the model is not downloaded".to_owned(),
        ))
    }

    fn name(&self) -> &'static str {
        LlamaSettings::NAME
    }
}

/// Returns the number of CPU cores minus one. The last core is left for the HTTP and gRPC APIs.
fn default_threads() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    u16::try_from(cores.saturating_sub(1).max(1)).unwrap_or(u16::MAX)
}
