//! The settings of the llama runner.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use llama_cpp_2::context::params::KvCacheType;

/// Settings of the llama.cpp runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaOptions {
    /// The GGUF file; the first one if the model is split into several files.
    pub model_path: PathBuf,
    /// Number of threads that generate tokens, at least 1, including the worker's own thread. One core should be left
    /// for the server: compute threads that compete for a core wait for each other, which is slower.
    pub threads: usize,
    /// Number of threads that compute prompts. `None` selects `threads`.
    pub threads_batch: Option<usize>,
    /// Maximum number of tokens in one sequence (prompt plus completion), from 1 to the length that the model was
    /// trained on. `None` selects the trained length, but at most 2,048. Every slot uses memory
    /// for this many tokens.
    pub context_length: Option<u32>,
    /// Names of the GPUs that hold the model, such as `CUDA0`. Several GPUs share the layers. If empty, all discrete
    /// GPUs hold the model, or the integrated GPUs if there is no discrete one.
    pub devices: Vec<String>,
    /// Number of layers that GPUs hold; the CPU holds the others. `None` means all. Without a GPU it has no effect.
    pub gpu_layers: Option<u32>,
    /// Use of llama.cpp's flash attention.
    pub flash_attention: FlashAttention,
    /// Type of the keys in the KV cache.
    pub cache_type_k: CacheType,
    /// Type of the values in the KV cache.
    pub cache_type_v: CacheType,
    /// True if a sequence may start from tokens that an earlier sequence has computed.
    pub prefix_caching: bool,
    /// Memory in bytes for the computed tokens of sequences that had to leave their slot. 0 keeps computed tokens only
    /// in slots.
    pub prefix_cache_bytes: usize,
    /// Target for the longest duration of a step with prompt tokens. The runner adapts the number of prompt tokens in a
    /// step to it. A long prompt is computed in parts of at least 128 tokens, even if a part takes longer.
    pub max_step: Duration,
}

impl Default for LlamaOptions {
    /// Returns options without a model file, for one thread.
    fn default() -> Self {
        Self {
            model_path: PathBuf::new(),
            threads: 1,
            threads_batch: None,
            context_length: None,
            devices: Vec::new(),
            gpu_layers: None,
            flash_attention: FlashAttention::Auto,
            cache_type_k: CacheType::F16,
            cache_type_v: CacheType::F16,
            prefix_caching: true,
            prefix_cache_bytes: 1024 * 1024 * 1024,
            max_step: Duration::from_millis(700),
        }
    }
}

/// Use of llama.cpp's flash attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlashAttention {
    /// Flash attention is used if the device supports it.
    Auto,
    /// Flash attention is used. Loading fails if the device does not support it.
    On,
    /// Flash attention is not used.
    Off,
}

impl FlashAttention {
    /// The value of llama.cpp's `llama_flash_attn_type`.
    pub(super) fn policy(self) -> i32 {
        match self {
            Self::Auto => -1,
            Self::Off => 0,
            Self::On => 1,
        }
    }
}

impl FromStr for FlashAttention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err("must be auto, on or off".to_owned()),
        }
    }
}

/// Type of the numbers in the KV cache. Types with fewer bits per number save memory, and lose accuracy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
    /// 16 bits, with the range of a 32-bit float.
    Bf16,
    /// 8.5 bits.
    Q8_0,
    /// 6 bits.
    Q5_1,
    /// 5.5 bits.
    Q5_0,
    /// 5 bits.
    Q4_1,
    /// 4.5 bits.
    Q4_0,
}

/// The number of values in one block of a quantized type.
const BLOCK_VALUES: u64 = 32;

impl CacheType {
    /// llama.cpp's name of each type.
    const NAMES: [(&str, Self); 8] = [
        ("f32", Self::F32),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("q8_0", Self::Q8_0),
        ("q5_1", Self::Q5_1),
        ("q5_0", Self::Q5_0),
        ("q4_1", Self::Q4_1),
        ("q4_0", Self::Q4_0),
    ];

    /// Returns true for the types with blocks of numbers that share a scale.
    pub(crate) fn is_quantized(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => false,
            Self::Q8_0 | Self::Q5_1 | Self::Q5_0 | Self::Q4_1 | Self::Q4_0 => true,
        }
    }

    pub(super) fn llama_type(self) -> KvCacheType {
        match self {
            Self::F32 => KvCacheType::F32,
            Self::F16 => KvCacheType::F16,
            Self::Bf16 => KvCacheType::BF16,
            Self::Q8_0 => KvCacheType::Q8_0,
            Self::Q5_1 => KvCacheType::Q5_1,
            Self::Q5_0 => KvCacheType::Q5_0,
            Self::Q4_1 => KvCacheType::Q4_1,
            Self::Q4_0 => KvCacheType::Q4_0,
        }
    }

    /// Returns the memory of this many values, in bytes.
    pub(super) fn bytes(self, values: u64) -> u64 {
        let block_bytes = match self {
            Self::F32 => 128,
            Self::F16 | Self::Bf16 => 64,
            Self::Q8_0 => 34,
            Self::Q5_1 => 24,
            Self::Q5_0 => 22,
            Self::Q4_1 => 20,
            Self::Q4_0 => 18,
        };
        values.saturating_mul(block_bytes) / BLOCK_VALUES
    }
}

impl FromStr for CacheType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.into_iter().find(|(name, _)| *name == text);
        known.map(|(_, kind)| kind).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(", ");
            format!("must be one of {names}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_size() {
        let bits = |kind: CacheType| kind.bytes(64) * 8;
        assert_eq!(bits(CacheType::F16), 64 * 16);
        assert_eq!(bits(CacheType::Q8_0), 64 * 17 / 2);
        assert_eq!(bits(CacheType::Q4_0), 64 * 9 / 2);
    }

    #[test]
    fn an_unknown_type_is_rejected_with_the_known_ones() {
        assert_eq!("q8_0".parse(), Ok(CacheType::Q8_0));
        let error = "q9".parse::<CacheType>().unwrap_err();
        assert!(error.contains("f16, bf16, q8_0"), "{error}");
    }
}
