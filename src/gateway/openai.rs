//! OpenAI's dialects: `/v1/completions` and `/v1/chat/completions`, and the parts that both share.

mod chat;
mod completions;
mod description;
pub mod lines;
mod logprobs;
pub(super) mod message;
mod metadata;
mod shared_fields;
mod stream_options;
mod timings;
mod usage;

pub(super) use chat::Chat;
pub(super) use completions::Completions;
pub use metadata::CompletionRoute;
pub use stream_options::StreamOptions;
