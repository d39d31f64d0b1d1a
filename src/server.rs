//! Builds the parts, serves, and drains.
mod engine;
pub use engine::{EngineParts, ModelParts};
