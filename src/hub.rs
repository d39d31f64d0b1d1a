//! Models on the Hugging Face Hub: their names, the cache of their files, and downloads. This module must not know
//! settings, servers or runners; only the advice in its errors names settings.
//!
//! Other programs share the cache, whose layout comes from the crate `hf-hub`. This module sends its own HTTP requests
//! instead of those of `hf-hub`, for the reasons in `docs/decisions/010-hub-downloads.md`.

mod options;
mod reference;

pub use options::{DEFAULT_ENDPOINT, Endpoint, HubOptions, HubToken};
pub use reference::{FileChoice, HUB_PREFIX, HubModel};

#[cfg(feature = "llama-cpp")]
mod cache;
#[cfg(feature = "llama-cpp")]
mod client;
#[cfg(feature = "llama-cpp")]
mod context;
#[cfg(feature = "llama-cpp")]
mod download;
#[cfg(feature = "llama-cpp")]
mod error;
#[cfg(feature = "llama-cpp")]
mod fetch;
#[cfg(any(feature = "fuzzing", all(test, feature = "llama-cpp")))]
pub(crate) mod fuzzing;
#[cfg(feature = "llama-cpp")]
mod list;
#[cfg(feature = "llama-cpp")]
mod proxy;
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
mod repo_files;
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
mod select;
#[cfg(feature = "llama-cpp")]
mod space;
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
mod url;

#[cfg(feature = "llama-cpp")]
pub use context::DownloadProgress;
#[cfg(feature = "llama-cpp")]
pub use error::HubError;
#[cfg(feature = "llama-cpp")]
pub use fetch::fetch;
#[cfg(feature = "llama-cpp")]
pub use list::{CachedModel, cached_models, render_models};
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
pub use select::SelectError;
