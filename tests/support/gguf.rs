//! A tiny GGUF model that llama.cpp can run. The tests build the file themselves, so that they can damage any part of
//! it.

/// The parts of a model file. A test can change each of them before it writes the file.
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub values: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    U16(u16),
    I32(i32),
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A tensor: its header entry and its data.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dimensions: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;
const WIDTH: u64 = 32;
const HEAD: u64 = 16;
const FEED_FORWARD: u64 = 64;

/// Ids of the special tokens `<s>` and `</s>`. The ids below 256 stand for the bytes.
pub const BOS: u32 = 256;
pub const EOS: u32 = 257;
const TOKENS: u64 = 258;

impl Gguf {
    /// Creates a model with one layer, an embedding length of 32 and one token per byte. Its output is noise.
    pub fn tiny() -> Self {
        let number = |key: &str, value: u32| (format!("llama.{key}"), Value::U32(value));
        let text = |key: &str, value: &str| (key.to_owned(), Value::Text(value.to_owned()));
        let tokenizer = |key: &str, value: Value| (format!("tokenizer.ggml.{key}"), value);
        let mut types = vec![1; 256];
        types.extend([3, 3]);
        Self {
            version: 3,
            values: vec![
                text("general.architecture", "llama"),
                text("general.name", "tiny"),
                ("general.alignment".to_owned(), Value::U32(32)),
                number("block_count", 1),
                number("context_length", 512),
                number("embedding_length", 32),
                number("feed_forward_length", 64),
                number("attention.head_count", 2),
                number("attention.head_count_kv", 1),
                number("attention.key_length", 16),
                number("attention.value_length", 16),
                number("rope.dimension_count", 16),
                number("vocab_size", 258),
                number("expert_count", 0),
                number("expert_used_count", 0),
                ("llama.rope.freq_base".to_owned(), Value::F32(10_000.0)),
                (
                    "llama.attention.layer_norm_rms_epsilon".to_owned(),
                    Value::F32(1e-5),
                ),
                text("llama.rope.scaling.type", "none"),
                text("tokenizer.ggml.model", "gpt2"),
                text("tokenizer.ggml.pre", "default"),
                tokenizer("tokens", Value::Texts(vocabulary())),
                tokenizer("token_type", Value::I32s(types)),
                tokenizer("scores", Value::F32s(vec![0.0; 258])),
                tokenizer("merges", Value::Texts(vec!["a b".to_owned()])),
                tokenizer("bos_token_id", Value::U32(BOS)),
                tokenizer("eos_token_id", Value::U32(EOS)),
                tokenizer("unknown_token_id", Value::U32(EOS)),
                tokenizer("padding_token_id", Value::U32(EOS)),
                tokenizer("add_bos_token", Value::Bool(false)),
                text(
                    "tokenizer.chat_template",
                    "{% for m in messages %}{{ m.content }}{% endfor %}",
                ),
            ],
            tensors: vec![
                random_tensor("token_embd.weight", &[WIDTH, TOKENS]),
                random_tensor("output_norm.weight", &[WIDTH]),
                random_tensor("blk.0.attn_norm.weight", &[WIDTH]),
                random_tensor("blk.0.attn_q.weight", &[WIDTH, 2 * HEAD]),
                random_tensor("blk.0.attn_k.weight", &[WIDTH, HEAD]),
                random_tensor("blk.0.attn_v.weight", &[WIDTH, HEAD]),
                random_tensor("blk.0.attn_output.weight", &[2 * HEAD, WIDTH]),
                random_tensor("blk.0.ffn_norm.weight", &[WIDTH]),
                random_tensor("blk.0.ffn_gate.weight", &[WIDTH, FEED_FORWARD]),
                random_tensor("blk.0.ffn_up.weight", &[WIDTH, FEED_FORWARD]),
                random_tensor("blk.0.ffn_down.weight", &[FEED_FORWARD, WIDTH]),
            ],
        }
    }

    /// Sets the value of a key. Adds the key if it is missing.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        match self.values.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.values.push((key.to_owned(), value)),
        }
        self
    }

    /// Removes a key.
    pub fn without(mut self, key: &str) -> Self {
        self.values.retain(|(name, _)| name != key);
        self
    }

    /// Splits the model into two files: the first `count` tensors, and the others.
    pub fn split(self, count: usize) -> [Self; 2] {
        let total = i32::try_from(self.tensors.len()).expect("few tensors");
        let part = |index: u16, values: Vec<(String, Value)>, tensors: &[Tensor]| {
            let part = Self {
                version: self.version,
                values,
                tensors: tensors.to_vec(),
            };
            part.with("split.no", Value::U16(index))
                .with("split.count", Value::U16(2))
                .with("split.tensors.count", Value::I32(total))
        };
        let (first, second) = self.tensors.split_at(count);
        [
            part(0, self.values.clone(), first),
            part(1, Vec::new(), second),
        ]
    }

    /// Returns the bytes of the model file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(encode_length(&self.tensors));
        out.extend(encode_length(&self.values));
        for (key, value) in &self.values {
            write_text(&mut out, key);
            value.put(&mut out);
        }
        let mut offset = 0_usize;
        for tensor in &self.tensors {
            write_text(&mut out, &tensor.name);
            let count = u32::try_from(tensor.dimensions.len()).expect("few dimensions");
            out.extend(count.to_le_bytes());
            for dimension in &tensor.dimensions {
                out.extend(dimension.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(u64::try_from(offset).expect("a small file").to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}

impl Value {
    fn put(&self, out: &mut Vec<u8>) {
        let scalar = |out: &mut Vec<u8>, kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U16(value) => scalar(out, 2, &value.to_le_bytes()),
            Self::I32(value) => scalar(out, 5, &value.to_le_bytes()),
            Self::U32(value) => scalar(out, 4, &value.to_le_bytes()),
            Self::F32(value) => scalar(out, 6, &value.to_le_bytes()),
            Self::Bool(value) => scalar(out, 7, &[u8::from(*value)]),
            Self::U64(value) => scalar(out, 10, &value.to_le_bytes()),
            Self::Text(value) => {
                out.extend(8_u32.to_le_bytes());
                write_text(out, value);
            }
            Self::Texts(values) => {
                write_list(out, 8, values);
                values.iter().for_each(|it| write_text(out, it));
            }
            Self::U32s(values) => {
                write_list(out, 4, values);
                values.iter().for_each(|it| out.extend(it.to_le_bytes()));
            }
            Self::I32s(values) => {
                write_list(out, 5, values);
                values.iter().for_each(|it| out.extend(it.to_le_bytes()));
            }
            Self::F32s(values) => {
                write_list(out, 6, values);
                values.iter().for_each(|it| out.extend(it.to_le_bytes()));
            }
        }
    }
}

fn encode_length<T>(items: &[T]) -> [u8; 8] {
    u64::try_from(items.len())
        .expect("a small file")
        .to_le_bytes()
}

fn write_list<T>(out: &mut Vec<u8>, kind: u32, items: &[T]) {
    out.extend(9_u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend(encode_length(items));
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    out.extend(encode_length(text.as_bytes()));
    out.extend(text.as_bytes());
}

/// Returns the vocabulary: GPT-2's printable character for each byte, followed by the two special tokens.
fn vocabulary() -> Vec<String> {
    let mut unprintable = (256..).filter_map(char::from_u32);
    let name = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => unprintable.next().expect("the range has enough characters"),
    };
    let bytes = (0..=255).map(name).map(String::from).collect::<Vec<_>>();
    let special = ["<s>", "</s>"].map(str::to_owned);
    bytes.into_iter().chain(special).collect()
}

/// Creates a tensor of pseudo-random values from -0.5 to 0.5, with a fixed seed.
fn random_tensor(name: &str, dimensions: &[u64]) -> Tensor {
    let count: u64 = dimensions.iter().product();
    let mut state = 1_u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).expect("16 bits")) / 65_536.0 - 0.5
    };
    Tensor {
        name: name.to_owned(),
        dimensions: dimensions.to_vec(),
        kind: 0,
        bytes: (0..count).flat_map(|_| number().to_le_bytes()).collect(),
    }
}
