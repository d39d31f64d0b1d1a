//! Whether the numbers of a GGUF header describe a model that llama.cpp can run. Each rule stands for a check
//! that llama.cpp makes by aborting the process, or does not make at all.

use super::{Element, Header, TOKENS, Value};

/// llama.cpp's `LLAMA_MAX_LAYERS`.
const MAX_LAYERS: i128 = 512;

/// llama.cpp's `LLAMA_MAX_EXPERTS`.
const MAX_EXPERTS: i128 = 1024;

/// Token ids, positions and lengths are an `i32` somewhere in llama.cpp.
const MAX_I32: i128 = 0x7fff_ffff;

/// What converters write for a special token that a model does not have: -1 as an unsigned number.
const NO_TOKEN: i128 = 0xffff_ffff;

/// The names that llama.cpp knows; it aborts on others.
const ROPE_SCALINGS: [&str; 4] = ["none", "linear", "yarn", "longrope"];

/// Checks the counts and sizes of the model, and its tokenizer.
///
/// # Errors
/// With the key, its value, and what is allowed.
pub(in super::super) fn check_model(header: &Header) -> Result<(), String> {
    let Some(architecture) = header.text("general.architecture") else {
        return Err("`general.architecture` is missing; it must name the kind of model".to_owned());
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

/// The metadata of one model, whose keys begin with the name of its architecture.
struct Model<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Model<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A number in a range, where it is there and is no list.
    fn optional(&self, name: &str, min: i128, max: i128) -> Result<Option<i128>, String> {
        let key = self.key(name);
        if matches!(self.header.value(&key), Some(Value::List { .. })) {
            return Ok(None);
        }
        let Some(value) = self.header.integer(&key)? else {
            return Ok(None);
        };
        if (min..=max).contains(&value) {
            Ok(Some(value))
        } else {
            Err(format!(
                "`{key}` is {value}; it must be from {min} to {max}"
            ))
        }
    }

    fn required(&self, name: &str, min: i128, max: i128) -> Result<i128, String> {
        let value = self.optional(name, min, max)?;
        value.ok_or_else(|| {
            let key = self.key(name);
            format!("`{key}` is missing; it must be a number from {min} to {max}")
        })
    }

    /// One number for each layer, from a list or from a single number. Empty where it is not there.
    fn per_layer(&self, name: &str, layers: i128) -> Result<Vec<i128>, String> {
        let key = self.key(name);
        match self.header.value(&key) {
            None => Ok(Vec::new()),
            Some(Value::List { count, numbers, .. }) => {
                if i128::from(*count) == layers && i128::try_from(numbers.len()) == Ok(layers) {
                    return Ok(numbers.clone());
                }
                Err(format!(
                    "`{key}` has {count} numbers; it must have {layers}, one for each layer"
                ))
            }
            Some(_) => {
                let value = self.header.integer(&key)?.unwrap_or(0);
                let layers = usize::try_from(layers).unwrap_or(0);
                Ok(vec![value; layers])
            }
        }
    }

    /// Whether layers may do without attention, as those of Mamba and RWKV do.
    fn is_recurrent(&self) -> bool {
        let prefixes = [self.key("ssm."), self.key("wkv."), self.key("kda.")];
        let mut keys = self.header.values.keys();
        keys.any(|key| prefixes.iter().any(|prefix| key.starts_with(prefix)))
    }

    /// llama.cpp divides the width by the heads, and the heads by those of keys and values.
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
                "`{key}` is {heads}; it must be at most the embedding length, {width}"
            ));
        }
        for (heads, kv_heads) in heads.iter().zip(&kv_heads) {
            let divides = *kv_heads == 0 || (*kv_heads > 0 && heads % kv_heads == 0);
            if !divides {
                let key = self.key(KV_HEADS);
                return Err(format!(
                    "`{key}` is {kv_heads}; it must divide the number of heads, {heads}"
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
                return Err(format!("`{key}` is {count}; it must be even"));
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
                return Err(format!("`{key}` is {number}; it must be {least}"));
            }
        }
        let key = self.key("rope.scaling.type");
        match self.header.text(&key) {
            Some(name) if !ROPE_SCALINGS.contains(&name) => {
                let known = ROPE_SCALINGS.join(", ");
                Err(format!("`{key}` is {name:?}; it must be one of {known}"))
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
                return Err(format!("`{key}` is {epsilon}; it must be 0 or more"));
            }
        }
        Ok(())
    }

    fn check_experts(&self, layers: i128) -> Result<(), String> {
        let experts = self.optional("expert_count", 0, MAX_EXPERTS)?.unwrap_or(0);
        // llama.cpp reads one expert as none here.
        if self.architecture.starts_with("hunyuan") && experts <= 1 {
            return Ok(());
        }
        let used = self.per_layer("expert_used_count", layers)?;
        let least = i128::from(experts > 0);
        let most_used = used.iter().copied().max().unwrap_or(0);
        if used.iter().any(|it| *it < 0) || !(least..=experts).contains(&most_used) {
            let key = self.key("expert_used_count");
            return Err(format!(
                "`{key}` is {most_used}; it must be from {least} to {experts}"
            ));
        }
        let groups = self.optional("expert_group_count", 0, (experts - 1).max(0))?;
        let Some(groups) = groups.filter(|groups| *groups > 1) else {
            return Ok(());
        };
        if experts % groups != 0 {
            let key = self.key("expert_group_count");
            return Err(format!(
                "`{key}` is {groups}; it must divide the number of experts, {experts}"
            ));
        }
        self.required("expert_group_used_count", 1, groups - 1)?;
        Ok(())
    }
}

/// Checks the lists of the vocabulary against each other, and the special tokens against the lists.
fn check_tokenizer(header: &Header) -> Result<(), String> {
    let kind = header.text("tokenizer.ggml.model");
    if kind.is_none_or(|kind| kind == "none" || kind == "no_vocab") {
        // `check_can_complete` says that there is no tokenizer.
        return Ok(());
    }
    let Some(Value::List {
        element: Element::Text,
        count,
        ..
    }) = header.value(TOKENS)
    else {
        return Err(format!("`{TOKENS}` is missing; it must be a list of texts"));
    };
    let tokens = i128::from(*count);
    if !(1..=MAX_I32).contains(&tokens) {
        return Err(format!(
            "`{TOKENS}` has {tokens} tokens; it must have from 1 to {MAX_I32}"
        ));
    }
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        match header.value(key) {
            None => {}
            Some(Value::List { count, .. }) if i128::from(*count) == tokens => {}
            Some(Value::List { count, .. }) => {
                return Err(format!(
                    "`{key}` has {count} values; it must have {tokens}, one for each token"
                ));
            }
            Some(_) => return Err(format!("`{key}` must be a list")),
        }
    }
    check_embedding(header, tokens)?;
    // SentencePiece tokenizers write what they have no token for byte by byte.
    if let (Some("llama"), Some(byte)) = (kind, header.missing_byte) {
        return Err(format!(
            "`{TOKENS}` lacks the token `<0x{byte:02X}>`; it must have one for each byte"
        ));
    }
    let special = header.values.keys();
    let special =
        special.filter(|key| key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id"));
    for key in special {
        let id = header.integer(key)?.unwrap_or(0);
        if id != NO_TOKEN && id != -1 && !(0..tokens).contains(&id) {
            let last = tokens - 1;
            return Err(format!(
                "`{key}` is {id}; the vocabulary has the tokens 0 to {last}"
            ));
        }
    }
    Ok(())
}

/// The embedding has a row for each token.
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
        "`{TOKENS}` has {tokens} tokens; tensor `token_embd.weight` has {rows} rows"
    ))
}
