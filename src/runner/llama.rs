//! Runs GGUF models with llama.cpp. This module knows files, sequences and tokens. It must not know
//! requests, streams, queues or protocols.
//!
//! A loaded model has two parts: all threads share `model`; `device` stays on the worker's thread. llama.cpp's log
//! lines go to `tracing` with the target `llama-cpp-2`.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::{LogOptions, send_logs_to_tracing};

use super::{DeviceFacts, LoadError, LoadedModel, Loader, Resumption};
use device::{Context, DeviceOptions, LlamaRunner, batch_rows};
use devices::{LayerPlacement, SelectedDevices};
use model::{GgufModel, Guarantees};
pub use options::{CacheType, FlashAttention, LlamaOptions};

mod chat;
mod computed_tokens;
mod device;
mod devices;
mod first_logits;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod gguf;
mod logprobs;
mod model;
mod options;
mod prefill;
mod prefix_cache;
mod sampling;
mod sequence;
mod step_budget;

/// Default context length in tokens. It is long enough for a chat and needs little memory.
pub(crate) const DEFAULT_CONTEXT_LENGTH: u32 = 2048;

/// Maximum number of sequences in one llama.cpp context (`LLAMA_MAX_SEQ`).
pub(crate) const MAX_SLOTS: usize = 256;

/// The value of `general.file_type` in a GGUF file whose weights are mostly Q4_1 (`LLAMA_FTYPE_MOSTLY_Q4_1`).
const MOSTLY_Q4_1: &str = "3";

/// Loads one GGUF model. Each worker loads the model once, and all of them share the memory pages of the file.
pub struct LlamaLoader {
    options: LlamaOptions,
}

impl LlamaLoader {
    /// Creates a loader with these options.
    #[must_use]
    pub fn new(options: LlamaOptions) -> Self {
        Self { options }
    }

    /// Loads the model's shared part and its device.
    fn load_parts(
        &self,
        slots: usize,
        progress: &dyn Fn(f32),
    ) -> Result<(Arc<GgufModel>, LlamaRunner), LoadError> {
        let path = &self.options.model_path;
        check_model(path)?;
        let backend = init_backend()?;
        let devices = SelectedDevices::select(&self.options)?;
        let llama = load_file(backend, devices.layers(&self.options), path, progress)?;
        let context_length = self.context_length(&llama)?;
        let params = self.context_params(slots, context_length)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let guarantees = self.guarantees(&llama, &devices);
        let device = DeviceFacts {
            name: devices.describe(&self.options),
            slot_bytes: self.slot_bytes(&llama, context_length),
        };
        let model = GgufModel::new(llama, name.into_owned(), context_length, guarantees)?
            .with_device(device);
        let model = Arc::new(model);
        let context = Context::try_new(Arc::clone(&model), |model| {
            model.llama().new_context(backend, params)
        });
        let context = context.map_err(|_| {
            LoadError(format!(
                "llama.cpp could not create a context of {slots} slots with {context_length} tokens \
                 each; see its log lines: either memory is short or the model is not supported"
            ))
        })?;
        let options = DeviceOptions {
            slots,
            reuses_prefixes: guarantees.reuses_prefixes,
            prefix_cache_bytes: self.options.prefix_cache_bytes,
            max_step: self.options.max_step,
        };
        Ok((model, LlamaRunner::new(context, options)))
    }

    fn context_length(&self, llama: &LlamaModel) -> Result<u32, LoadError> {
        let trained = llama.n_ctx_train();
        match self.options.context_length {
            None => Ok(trained.min(DEFAULT_CONTEXT_LENGTH)),
            Some(length) if (1..=trained).contains(&length) => Ok(length),
            Some(length) => Err(LoadError(format!(
                "`context_length` must be from 1 to {trained}, the length that the model was trained \
                 on (got {length})"
            ))),
        }
    }

    fn guarantees(&self, llama: &LlamaModel, devices: &SelectedDevices) -> Guarantees {
        Guarantees {
            resumption: self.resumption(llama, devices),
            // A recurrent state cannot be cut back to an earlier token.
            reuses_prefixes: self.options.prefix_caching
                && !llama.is_recurrent()
                && !llama.is_hybrid(),
        }
    }

    /// Returns the guarantee for resumed sequences. It is `Exact` only for the setup that a test covers. There, a
    /// row's logits have the same bits alone, in a batch, and in any chunk of a prompt.
    ///
    /// With more threads, llama.cpp splits the attention of a lone sequence among them, which rounds differently than
    /// in a batch. Other types of weights use separate kernels for several rows.
    fn resumption(&self, llama: &LlamaModel, devices: &SelectedDevices) -> Resumption {
        let is = |key: &str, value: &str| llama.meta_val_str(key).is_ok_and(|it| it == value);
        let is_tested = is("general.architecture", "llama") && is("general.file_type", MOSTLY_Q4_1);
        let options = &self.options;
        let is_default = options.flash_attention != FlashAttention::Off
            && (options.cache_type_k, options.cache_type_v) == (CacheType::F16, CacheType::F16)
            && options.threads_batch.is_none_or(|threads| threads == 1)
            && devices.is_cpu_only(options);
        if is_tested && is_default && options.threads == 1 {
            Resumption::Exact
        } else {
            Resumption::Contiguous
        }
    }

    /// Returns the memory of one slot's KV cache in bytes. Assumes that all layers are like the first one, so the
    /// number is an estimate for a model whose layers differ.
    fn slot_bytes(&self, llama: &LlamaModel, context_length: u32) -> u64 {
        let architecture = llama
            .meta_val_str("general.architecture")
            .unwrap_or_default();
        let head = u64::try_from(llama.n_embd()).unwrap_or(0) / u64::from(llama.n_head().max(1));
        let length = |key: &str| -> u64 {
            let value = llama.meta_val_str(&format!("{architecture}.attention.{key}"));
            value.ok().and_then(|it| it.parse().ok()).unwrap_or(head)
        };
        let rows =
            u64::from(llama.n_layer()) * u64::from(llama.n_head_kv()) * u64::from(context_length);
        self.options.cache_type_k.bytes(rows * length("key_length"))
            + self
                .options
                .cache_type_v
                .bytes(rows * length("value_length"))
    }

    fn context_params(
        &self,
        slots: usize,
        context_length: u32,
    ) -> Result<LlamaContextParams, LoadError> {
        if slots == 0 || slots > MAX_SLOTS {
            let reason = format!("`slots` must be from 1 to {MAX_SLOTS} (got {slots})");
            return Err(LoadError(reason));
        }
        self.warn_about_threads();
        let threads = thread_count("threads", self.options.threads)?;
        let threads_batch = match self.options.threads_batch {
            Some(threads) => thread_count("threads_batch", threads)?,
            None => threads,
        };
        let too_large = || {
            let max = u32::MAX;
            LoadError(format!(
                "`slots` × `context_length` must be at most {max} (got {slots} × {context_length})"
            ))
        };
        let slots_u32 = u32::try_from(slots).map_err(|_| too_large())?;
        // llama.cpp divides the cells of the KV cache equally among the sequences.
        let cells = context_length
            .checked_mul(slots_u32)
            .ok_or_else(too_large)?;
        let rows = u32::try_from(batch_rows(slots)).map_err(|_| too_large())?;
        Ok(LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(cells))
            .with_n_seq_max(slots_u32)
            .with_n_batch(rows)
            .with_n_ubatch(rows)
            .with_n_threads(threads)
            .with_n_threads_batch(threads_batch)
            .with_flash_attention_policy(self.options.flash_attention.policy())
            .with_type_k(self.options.cache_type_k.llama_type())
            .with_type_v(self.options.cache_type_v.llama_type())
            // Each sequence gets separate cells, so that its results do not depend on other sequences.
            .with_kv_unified(false))
    }
}

impl Loader for LlamaLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let parts = self.load_parts(slots, progress);
        let (model, runner) = parts.map_err(|LoadError(reason)| {
            let path = self.options.model_path.display();
            LoadError(format!("{path}: {reason}"))
        })?;
        Ok(LoadedModel {
            model,
            runner: Box::new(runner),
        })
    }

    fn name(&self) -> &'static str {
        "llama"
    }
}

impl LlamaLoader {
    /// Logs a warning if there are more threads than cores. llama.cpp's threads wait for each other in busy loops, so
    /// surplus threads make every call much slower.
    fn warn_about_threads(&self) {
        let cores = std::thread::available_parallelism().map_or(usize::MAX, NonZeroUsize::get);
        let LlamaOptions {
            threads,
            threads_batch,
            ..
        } = self.options;
        if threads > cores || threads_batch.is_some_and(|threads| threads > cores) {
            tracing::warn!(
                threads,
                threads_batch,
                cores,
                "a worker has more threads than this machine has cores, which makes it slow"
            );
        }
    }
}

/// Converts a number of threads for llama.cpp.
fn thread_count(key: &str, threads: usize) -> Result<i32, LoadError> {
    let count = i32::try_from(threads).ok().filter(|it| *it > 0);
    count.ok_or_else(|| {
        let max = i32::MAX;
        LoadError(format!("`{key}` must be from 1 to {max} (got {threads})"))
    })
}

/// Initializes llama.cpp once per process. It is never shut down.
fn init_backend() -> Result<&'static LlamaBackend, LoadError> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    let backend = BACKEND.get_or_init(|| {
        send_logs_to_tracing(LogOptions::default());
        LlamaBackend::init().map_err(|error| error.to_string())
    });
    backend
        .as_ref()
        .map_err(|error| LoadError(format!("llama.cpp could not be initialized: {error}")))
}

/// Checks that the file is readable and starts like a GGUF file. For a split model, checks all its files. The check
/// runs before the server starts, so that a wrong path is reported at once.
///
/// # Errors
/// A file cannot be read or is not a GGUF file.
pub(crate) fn check_file(path: &Path) -> Result<(), LoadError> {
    gguf::split::check_files(path).map_err(LoadError)
}

/// Checks the files of a model before llama.cpp loads it, because llama.cpp aborts the process on many errors.
fn check_model(path: &Path) -> Result<(), LoadError> {
    let header = gguf::split::read_header(path).map_err(LoadError)?;
    gguf::check_model(&header).map_err(LoadError)
}

/// Loads the model file on a separate thread: llama.cpp requires a `'static` progress callback, which cannot borrow
/// `progress`.
fn load_file(
    backend: &LlamaBackend,
    layers: LayerPlacement,
    path: &Path,
    progress: &dyn Fn(f32),
) -> Result<LlamaModel, LoadError> {
    let (sender, fractions) = sync_channel(16);
    let loaded = std::thread::scope(|scope| {
        let loading = scope.spawn(move || {
            let params = layers.model_params().map_err(|error| error.to_string())?;
            let params = params.with_progress_callback(move |fraction| {
                // If the channel is full, this progress report is dropped. A later report replaces it.
                let _ = sender.try_send(fraction);
                true
            });
            LlamaModel::load_from_file(backend, path, &params).map_err(|error| error.to_string())
        });
        for fraction in fractions {
            progress(fraction);
        }
        loading.join()
    });
    loaded
        .map_err(|_| LoadError("loading the model file panicked".to_owned()))?
        .map_err(|error| {
            LoadError(format!(
                "llama.cpp could not load this model file ({error}); see its log lines"
            ))
        })
}
