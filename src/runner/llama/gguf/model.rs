//! Checks that a GGUF header describes a model that llama.cpp can run. Where a header breaks one of these rules,
//! llama.cpp aborts the process or misbehaves.

use super::{Header, TOKENS_KEY, Value, ValueType};

/// Maximum number of layers in llama.cpp (`LLAMA_MAX_LAYERS`).
const MAX_LAYERS: i128 = 512;

/// Maximum number of experts in llama.cpp (`LLAMA_MAX_EXPERTS`).
const MAX_EXPERTS: i128 = 1024;

/// Maximum value of token ids, positions and lengths, which llama.cpp stores as `i32`.
const MAX_I32: i128 = 0x7fff_ffff;

/// Id of a special token that the model does not have: some converters write -1 as an unsigned number.
const ABSENT_TOKEN_ID: i128 = 0xffff_ffff;

/// Values of `rope.scaling.type` that llama.cpp supports. It aborts on any other value.
const ROPE_SCALINGS: [&str; 4] = ["none", "linear", "yarn", "longrope"];

/// Checks the model's counts and sizes, and its tokenizer.
///
/// # Errors
/// A value is missing or not allowed. The error names the key, the value and the allowed range.
pub(in super::super) fn check_model(header: &Header) -> Result<(), String> {
    let Some(architecture) = header.string("general.architecture") else {
        return Err(
            "`general.architecture` is missing; it must name the model's architecture".to_owned(),
        );
    };
    let model = Model {
        header,
        architecture,
    };
    let layers = model.required("block_count", 1, MAX_LAYERS)?;
    model.required("context_length", 1, MAX_I32)?;
    let width = model.required("embedding_length", 1, MAX_I32)?;
    model.optional("nextn_predict_layers", 0, layers - 1)?;
    model.optional("vocab_size", 1, MAX_I32)?;
    model.check_heads(layers, width)?;
    model.check_rope()?;
    model.check_epsilons()?;
    model.check_experts(layers)?;
    check_tokenizer(header)
}

/// The metadata of a model. Its keys start with the architecture's name.
struct Model<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Model<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// Reads an integer and checks its range. Returns `None` if the key is missing or its value is an array.
    fn optional(&self, name: &str, min: i128, max: i128) -> Result<Option<i128>, String> {
        let key = self.key(name);
        if matches!(self.header.value(&key), Some(Value::Array { .. })) {
            return Ok(None);
        }
        let Some(value) = self.header.integer(&key)? else {
            return Ok(None);
        };
        if (min..=max).contains(&value) {
            Ok(Some(value))
        } else {
            Err(format!("`{key}` must be from {min} to {max} (got {value})"))
        }
    }

    fn required(&self, name: &str, min: i128, max: i128) -> Result<i128, String> {
        let value = self.optional(name, min, max)?;
        value.ok_or_else(|| {
            let key = self.key(name);
            format!("`{key}` is missing; it must be an integer from {min} to {max}")
        })
    }

    /// Reads one integer per layer, from an array or from a single number for all layers. Returns an empty list if
    /// the key is missing.
    fn per_layer(&self, name: &str, layers: i128) -> Result<Vec<i128>, String> {
        let key = self.key(name);
        match self.header.value(&key) {
            None => Ok(Vec::new()),
            Some(Value::Array { count, numbers, .. }) => {
                if i128::from(*count) == layers && i128::try_from(numbers.len()) == Ok(layers) {
                    return Ok(numbers.clone());
                }
                Err(format!(
                    "`{key}` must have {layers} integers, one per layer (got {count})"
                ))
            }
            Some(_) => {
                let value = self.header.integer(&key)?.unwrap_or(0);
                let layers = usize::try_from(layers).unwrap_or(0);
                Ok(vec![value; layers])
            }
        }
    }

    /// Returns true for an architecture whose layers may lack attention, such as Mamba and RWKV.
    fn is_recurrent(&self) -> bool {
        let prefixes = [self.key("ssm."), self.key("wkv."), self.key("kda.")];
        let mut keys = self.header.values.keys();
        keys.any(|key| prefixes.iter().any(|prefix| key.starts_with(prefix)))
    }

    /// Checks that llama.cpp's divisions work: embedding length by number of heads, and number of heads by number of
    /// key-value heads.
    fn check_heads(&self, layers: i128, width: i128) -> Result<(), String> {
        const HEADS: &str = "attention.head_count";
        const KV_HEADS: &str = "attention.head_count_kv";
        let least = if self.is_recurrent() { 0 } else { 1 };
        self.optional(HEADS, least, MAX_I32)?;
        self.optional(KV_HEADS, least, MAX_I32)?;
        let heads = self.per_layer(HEADS, layers)?;
        let kv_heads = self.per_layer(KV_HEADS, layers)?;
        let has_key_length = self.optional("attention.key_length", 1, MAX_I32)?.is_some();
        self.optional("attention.value_length", 1, MAX_I32)?;
        if let Some(heads) = heads.first()
            && *heads > width
            && !has_key_length
        {
            let key = self.key(HEADS);
            return Err(format!(
                "`{key}` must be at most the embedding length, {width} (got {heads})"
            ));
        }
        for (heads, kv_heads) in heads.iter().zip(&kv_heads) {
            let divides = *kv_heads == 0 || (*kv_heads > 0 && heads % kv_heads == 0);
            if !divides {
                let key = self.key(KV_HEADS);
                return Err(format!(
                    "`{key}` must divide the number of heads, {heads} (got {kv_heads})"
                ));
            }
        }
        Ok(())
    }

    fn check_rope(&self) -> Result<(), String> {
        for name in ["rope.dimension_count", "rope.dimension_count_swa"] {
            if let Some(count) = self.optional(name, 0, MAX_I32)?
                && count % 2 != 0
            {
                let key = self.key(name);
                return Err(format!("`{key}` must be even (got {count})"));
            }
        }
        for (name, may_be_zero) in [
            ("rope.freq_base", false),
            ("rope.freq_base_swa", false),
            ("rope.scaling.factor", true),
        ] {
            let key = self.key(name);
            let Some(Value::Float(number)) = self.header.value(&key) else {
                continue;
            };
            let is_zero = *number == 0.0;
            if !number.is_finite() || *number < 0.0 || (is_zero && !may_be_zero) {
                let least = if may_be_zero { "0 or more" } else { "above 0" };
                return Err(format!("`{key}` must be {least} (got {number})"));
            }
        }
        let key = self.key("rope.scaling.type");
        match self.header.string(&key) {
            Some(name) if !ROPE_SCALINGS.contains(&name) => {
                let known = ROPE_SCALINGS.join(", ");
                Err(format!("`{key}` must be one of {known} (got {name:?})"))
            }
            _ => Ok(()),
        }
    }

    fn check_epsilons(&self) -> Result<(), String> {
        for name in [
            "layer_norm_epsilon",
            "layer_norm_rms_epsilon",
            "group_norm_epsilon",
        ] {
            let key = self.key(&format!("attention.{name}"));
            if let Some(Value::Float(epsilon)) = self.header.value(&key)
                && !(epsilon.is_finite() && *epsilon >= 0.0)
            {
                return Err(format!("`{key}` must be 0 or more (got {epsilon})"));
            }
        }
        Ok(())
    }

    fn check_experts(&self, layers: i128) -> Result<(), String> {
        let experts = self.optional("expert_count", 0, MAX_EXPERTS)?.unwrap_or(0);
        // For these models, llama.cpp treats a single expert like none.
        if self.architecture.starts_with("hunyuan") && experts <= 1 {
            return Ok(());
        }
        let used = self.per_layer("expert_used_count", layers)?;
        let least = i128::from(experts > 0);
        let most_used = used.iter().copied().max().unwrap_or(0);
        if used.iter().any(|it| *it < 0) || !(least..=experts).contains(&most_used) {
            let key = self.key("expert_used_count");
            return Err(format!(
                "`{key}` must be from {least} to {experts} (got {most_used})"
            ));
        }
        let groups = self.optional("expert_group_count", 0, (experts - 1).max(0))?;
        let Some(groups) = groups.filter(|groups| *groups > 1) else {
            return Ok(());
        };
        if experts % groups != 0 {
            let key = self.key("expert_group_count");
            return Err(format!(
                "`{key}` must divide the number of experts, {experts} (got {groups})"
            ));
        }
        self.required("expert_group_used_count", 1, groups - 1)?;
        Ok(())
    }
}

/// Checks the tokenizer: the vocabulary's arrays have the same length, and the special tokens are in the vocabulary.
fn check_tokenizer(header: &Header) -> Result<(), String> {
    let kind = header.string("tokenizer.ggml.model");
    if kind.is_none_or(|kind| kind == "none" || kind == "no_vocab") {
        // `check_can_complete` reports a missing tokenizer.
        return Ok(());
    }
    let Some(Value::Array {
        element: ValueType::String,
        count,
        ..
    }) = header.value(TOKENS_KEY)
    else {
        return Err(format!(
            "`{TOKENS_KEY}` is missing; it must be an array of strings"
        ));
    };
    let tokens = i128::from(*count);
    if !(1..=MAX_I32).contains(&tokens) {
        return Err(format!(
            "`{TOKENS_KEY}` must have from 1 to {MAX_I32} tokens (got {tokens})"
        ));
    }
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        match header.value(key) {
            None => {}
            Some(Value::Array { count, .. }) if i128::from(*count) == tokens => {}
            Some(Value::Array { count, .. }) => {
                return Err(format!(
                    "`{key}` must have {tokens} values, one per token (got {count})"
                ));
            }
            Some(_) => return Err(format!("`{key}` must be an array")),
        }
    }
    check_embedding(header, tokens)?;
    // SentencePiece tokenizers encode unknown characters byte by byte.
    if let (Some("llama"), Some(byte)) = (kind, header.missing_byte) {
        return Err(format!(
            "`{TOKENS_KEY}` lacks the token `<0x{byte:02X}>`; it must have one token per byte"
        ));
    }
    let special = header.values.keys();
    let special =
        special.filter(|key| key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id"));
    for key in special {
        let id = header.integer(key)?.unwrap_or(0);
        if id != ABSENT_TOKEN_ID && id != -1 && !(0..tokens).contains(&id) {
            let last = tokens - 1;
            return Err(format!(
                "`{key}` must be a token id from 0 to {last} (got {id})"
            ));
        }
    }
    Ok(())
}

/// Checks that the embedding matrix has one row per token.
fn check_embedding(header: &Header, tokens: i128) -> Result<(), String> {
    let mut tensors = header.tensors.iter();
    let Some(embedding) = tensors.find(|tensor| tensor.name == "token_embd.weight") else {
        return Ok(());
    };
    let rows = embedding.dimensions.get(1).copied().unwrap_or(1);
    if i128::from(rows) == tokens {
        return Ok(());
    }
    Err(format!(
        "tensor `token_embd.weight` must have {tokens} rows, one per token (got {rows})"
    ))
}
