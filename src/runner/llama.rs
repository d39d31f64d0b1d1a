//! A real model on llama.cpp: any GGUF file that it can load, on the CPU. It knows files, sequences
//! and tokens; it must not know requests, streams, queues or protocols.
//!
//! A loaded model is two halves: `model` is shared by every thread, `device` stays on its worker's.
//! A sequence resumes exactly on one thread with the kind of weights that the tests run, and
//! contiguously otherwise.
//! llama.cpp's own log lines go to `tracing`, under the target `llama-cpp-2`.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::{LogOptions, send_logs_to_tracing};

use super::{LoadError, LoadedModel, Loader, Resumption};
use device::{Context, LlamaRunner, rows};
use model::GgufModel;

mod chat;
mod device;
mod gguf;
mod logprobs;
mod model;
mod sampling;
mod sequence;

/// The context of a sequence when nobody says how long: long enough to chat, and little memory.
pub const DEFAULT_CONTEXT_LENGTH: u32 = 2048;

/// The most sequences of one context; it is a constant of llama.cpp (`LLAMA_MAX_SEQ`).
pub const MAX_SLOTS: usize = 256;

/// llama.cpp's `LLAMA_FTYPE_MOSTLY_Q4_1`, as a model file writes it.
const MOSTLY_Q4_1: &str = "3";

/// Which model to run, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaOptions {
    /// The GGUF file. Of a model in several files, the first.
    pub model_path: PathBuf,
    /// How many threads compute a step, at least 1; the worker's own is one of them. The server needs
    /// a core for itself: with none left the threads wait for each other and are slower than fewer.
    pub threads: usize,
    /// The most tokens of one sequence, prompt and completion together, up to what the model was
    /// trained on. `None` is that, or [`DEFAULT_CONTEXT_LENGTH`] where it is longer. Each slot has
    /// memory for so many tokens.
    pub context_length: Option<u32>,
}

/// Loads one GGUF model, once for each worker; the file's pages are shared.
pub struct LlamaLoader {
    options: LlamaOptions,
}

impl LlamaLoader {
    /// A loader of this model.
    #[must_use]
    pub fn new(options: LlamaOptions) -> Self {
        Self { options }
    }

    /// The two halves of the model.
    fn load_parts(
        &self,
        slots: usize,
        progress: &dyn Fn(f32),
    ) -> Result<(Arc<GgufModel>, LlamaRunner), LoadError> {
        let path = &self.options.model_path;
        check_model(path)?;
        let backend = backend()?;
        let llama = load_file(backend, path, progress)?;
        let context_length = self.context_length(&llama)?;
        let params = self.context_params(slots, context_length)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let resumption = self.resumption(&llama);
        let model = GgufModel::new(llama, name.into_owned(), context_length, resumption)?;
        let model = Arc::new(model);
        let context = Context::try_new(Arc::clone(&model), |model| {
            model.llama().new_context(backend, params)
        });
        let context = context.map_err(|_| {
            LoadError(format!(
                "there is not enough memory for {slots} sequences of {context_length} tokens, or \
                 llama.cpp cannot run this model; its log lines say which"
            ))
        })?;
        Ok((model, LlamaRunner::new(context, slots)))
    }

    fn context_length(&self, llama: &LlamaModel) -> Result<u32, LoadError> {
        let trained = llama.n_ctx_train();
        match self.options.context_length {
            None => Ok(trained.min(DEFAULT_CONTEXT_LENGTH)),
            Some(0) => Err(LoadError("a context of 0 tokens holds nothing".to_owned())),
            Some(asked) if asked > trained => Err(LoadError(format!(
                "a context of {asked} tokens is longer than the {trained} that it was trained on"
            ))),
            Some(asked) => Ok(asked),
        }
    }

    /// Exact where a test has shown it: the logits of a row have the same bits alone, in a batch, and
    /// in whatever chunk of a prompt. With a second thread llama.cpp divides the attention of a lone
    /// sequence among the threads, which rounds otherwise than in a batch; other kinds of weights have
    /// kernels of their own for several rows at once.
    fn resumption(&self, llama: &LlamaModel) -> Resumption {
        let is = |key: &str, value: &str| llama.meta_val_str(key).is_ok_and(|it| it == value);
        let tested = is("general.architecture", "llama") && is("general.file_type", MOSTLY_Q4_1);
        if tested && self.options.threads == 1 {
            Resumption::Exact
        } else {
            Resumption::Contiguous
        }
    }

    fn context_params(
        &self,
        slots: usize,
        context_length: u32,
    ) -> Result<LlamaContextParams, LoadError> {
        if slots == 0 || slots > MAX_SLOTS {
            let reason = format!("llama.cpp runs 1 to {MAX_SLOTS} sequences, not {slots}");
            return Err(LoadError(reason));
        }
        let threads = i32::try_from(self.options.threads)
            .ok()
            .filter(|it| *it > 0);
        let threads = threads.ok_or_else(|| {
            let threads = self.options.threads;
            LoadError(format!("llama.cpp cannot run on {threads} threads"))
        })?;
        let too_large = || LoadError(format!("{slots} × {context_length} tokens are too many"));
        let slots_u32 = u32::try_from(slots).map_err(|_| too_large())?;
        // The cells are divided evenly among the sequences.
        let cells = context_length
            .checked_mul(slots_u32)
            .ok_or_else(too_large)?;
        let rows = u32::try_from(rows(slots)).map_err(|_| too_large())?;
        Ok(LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(cells))
            .with_n_seq_max(slots_u32)
            .with_n_batch(rows)
            .with_n_ubatch(rows)
            .with_n_threads(threads)
            .with_n_threads_batch(threads)
            // Cells of its own for each sequence: what one computes does not depend on the others.
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

/// llama.cpp is set up once for the whole process, and never torn down.
fn backend() -> Result<&'static LlamaBackend, LoadError> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    let backend = BACKEND.get_or_init(|| {
        send_logs_to_tracing(LogOptions::default());
        LlamaBackend::init().map_err(|error| error.to_string())
    });
    backend
        .as_ref()
        .map_err(|error| LoadError(format!("llama.cpp cannot be set up: {error}")))
}

/// Says what is wrong with the setting before anything is started.
///
/// # Errors
/// When the file cannot be read, or is no GGUF file.
pub fn check_file(path: &Path) -> Result<(), LoadError> {
    gguf::check_magic(path).map_err(LoadError)
}

/// Says what is wrong with a model before llama.cpp, which ends the process over much of it.
fn check_model(path: &Path) -> Result<(), LoadError> {
    let header = gguf::Header::read(path).map_err(LoadError)?;
    gguf::check_model(&header).map_err(LoadError)
}

/// Loads the file on a thread of its own, because llama.cpp tells its progress to a callback that may
/// not borrow.
fn load_file(
    backend: &LlamaBackend,
    path: &Path,
    progress: &dyn Fn(f32),
) -> Result<LlamaModel, LoadError> {
    let (sender, fractions) = sync_channel(16);
    let loaded = std::thread::scope(|scope| {
        let loading = scope.spawn(move || {
            let params = LlamaModelParams::default().with_progress_callback(move |fraction| {
                // Progress is for the eye: where nobody keeps up, the next one says more.
                let _ = sender.try_send(fraction);
                true
            });
            LlamaModel::load_from_file(backend, path, &params)
        });
        for fraction in fractions {
            progress(fraction);
        }
        loading.join()
    });
    loaded
        .map_err(|_| LoadError("llama.cpp panicked over the model file".to_owned()))?
        .map_err(|error| {
            LoadError(format!(
                "llama.cpp cannot load this model file ({error}); its log lines say why"
            ))
        })
}
