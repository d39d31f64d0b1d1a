//! Reads and checks the header of a GGUF file before llama.cpp loads the file, because llama.cpp aborts the process
//! on many invalid headers.
//!
//! A length in the header is checked against the size of the file before memory is allocated for it. The file must
//! not change while it is read or served: llama.cpp maps it into memory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

mod model;
pub(super) mod split;
mod tensors;

pub(super) use model::check_model;

/// First bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";

/// GGUF versions that llama.cpp can read.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;

/// Maximum length in bytes of a key, of the name of a tensor, and of a string value that is kept. Longer string
/// values are skipped.
const MAX_STRING_BYTES: u64 = 64 * 1024;

/// Maximum length of an integer array that is kept. No model has that many layers.
const MAX_KEPT_NUMBERS: u64 = 4096;

/// Key of the vocabulary. All its tokens must differ, because llama.cpp looks tokens up by their text.
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";

/// Key of a file's index among the files of a split model, from 0.
const SPLIT_INDEX_KEY: &str = "split.no";

/// Key of the number of files of a split model.
const SPLIT_COUNT_KEY: &str = "split.count";

/// Checks that the file starts with [`MAGIC`].
///
/// # Errors
/// The file cannot be read or starts with other bytes.
fn check_magic(path: &Path) -> Result<(), String> {
    let mut magic = [0; MAGIC.len()];
    match File::open(path).and_then(|mut file| file.read(&mut magic)) {
        Err(error) => Err(format!("the model file cannot be read: {error}")),
        Ok(_) if magic == MAGIC => Ok(()),
        Ok(_) => Err("this is not a GGUF model file".to_owned()),
    }
}

/// The header of a GGUF file.
pub(super) struct Header {
    values: HashMap<String, Value>,
    tensors: Vec<Tensor>,
    /// The lowest byte value for which the vocabulary has no token, neither the byte itself nor an escape such as
    /// `<0x0A>`.
    missing_byte: Option<u8>,
}

/// A metadata value, reduced to the parts that are checked.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    /// A value that is not checked: a boolean, or a string that is too long to be kept.
    Unchecked,
    String(String),
    Array {
        element: ValueType,
        count: u64,
        /// Elements of a short integer array. Empty for any other array.
        numbers: Vec<i128>,
    },
}

/// Type of a value or of an array's elements. Numeric types have their size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueType {
    Unsigned(usize),
    Signed(usize),
    Float(usize),
    Bool,
    String,
}

/// Description of one tensor in the header.
struct Tensor {
    name: String,
    dimensions: Vec<u64>,
    /// Id of the tensor's data type in ggml.
    data_type: u32,
    /// Offset of the tensor's data in bytes, from the start of the data section.
    offset: u64,
}

impl Header {
    /// Reads the header of a file and checks its structure.
    ///
    /// # Errors
    /// The file cannot be read, is not a GGUF file, is truncated, or is inconsistent.
    fn read(path: &Path) -> Result<Self, String> {
        check_magic(path)?;
        let cannot_be_read = |error: io::Error| format!("the model file cannot be read: {error}");
        let file = File::open(path).map_err(cannot_be_read)?;
        let length = file.metadata().map_err(cannot_be_read)?.len();
        Self::parse(BufReader::new(file), length)
    }

    pub(super) fn parse(source: impl Read, length: u64) -> Result<Self, String> {
        let mut input = HeaderReader {
            source,
            position: 0,
            length,
            missing_byte: None,
        };
        if input.array().ok() != Some(MAGIC) {
            return Err("this is not a GGUF model file".to_owned());
        }
        let version = u32::from_le_bytes(input.array()?);
        if !VERSIONS.contains(&version) {
            return Err(format!("the GGUF version must be 2 or 3 (got {version})"));
        }
        let tensor_count = input.count("tensors", 24)?;
        let value_count = input.count("metadata values", 13)?;
        let mut values = HashMap::new();
        for _ in 0..value_count {
            let key = input.read_short_string("a metadata key")?;
            let value = input.read_value(&key)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("`{key}` is in the file twice"));
            }
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(input.tensor()?);
        }
        let header = Self {
            values,
            tensors,
            missing_byte: input.missing_byte,
        };
        tensors::check_tensors(&header, input.position, length)?;
        Ok(header)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Returns the integer value of this key, or `None` if the key is missing.
    ///
    /// # Errors
    /// The value has another type.
    fn integer(&self, key: &str) -> Result<Option<i128>, String> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(*value)),
            Some(_) => Err(format!("`{key}` must be an integer")),
        }
    }

    fn string(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::String(string)) => Some(string),
            _ => None,
        }
    }
}

/// Reads a file from front to back. Checks every length against the rest of the file.
struct HeaderReader<R> {
    source: R,
    /// Number of bytes read.
    position: u64,
    /// Size of the file in bytes.
    length: u64,
    missing_byte: Option<u8>,
}

impl<R: Read> HeaderReader<R> {
    fn remaining(&self) -> u64 {
        self.length - self.position
    }

    /// Records that `bytes` more bytes were read. Fails if the file is shorter.
    fn advance(&mut self, bytes: u64) -> Result<(), String> {
        if bytes > self.remaining() {
            return Err(self.truncated());
        }
        self.position += bytes;
        Ok(())
    }

    fn truncated(&self) -> String {
        let length = self.length;
        format!("the file is truncated: its {length} bytes end within the header")
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.advance(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
        let read = self.source.read_exact(bytes);
        read.map_err(|error| format!("the model file cannot be read: {error}"))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), String> {
        self.advance(bytes)?;
        let skipped = io::copy(&mut self.source.by_ref().take(bytes), &mut io::sink());
        match skipped {
            Ok(skipped) if skipped == bytes => Ok(()),
            Ok(_) => Err(self.truncated()),
            Err(error) => Err(format!("the model file cannot be read: {error}")),
        }
    }

    fn read_u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn read_u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads the number of items in a list. Each item takes at least `min_bytes` bytes of the file.
    fn count(&mut self, items: &str, min_bytes: u64) -> Result<u64, String> {
        let count = self.read_u64()?;
        if count.saturating_mul(min_bytes) > self.length {
            let length = self.length;
            return Err(format!(
                "the header declares {count} {items}, which do not fit into the file's {length} \
                 bytes; the file is truncated or damaged"
            ));
        }
        Ok(count)
    }

    /// Reads the bytes of a string. They may be invalid UTF-8.
    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, String> {
        if length > self.remaining() {
            return Err(self.truncated());
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| self.truncated())?];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a string of at most [`MAX_STRING_BYTES`]. `what` describes the string in errors.
    fn read_short_string(&mut self, what: &str) -> Result<String, String> {
        let length = self.read_u64()?;
        if length > MAX_STRING_BYTES {
            return Err(format!(
                "{what} must be at most {MAX_STRING_BYTES} bytes long (got {length})"
            ));
        }
        let bytes = self.bytes(length)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn read_value(&mut self, key: &str) -> Result<Value, String> {
        const ARRAY: u32 = 9;
        let code = self.read_u32()?;
        if code == ARRAY {
            let code = self.read_u32()?;
            return self.read_array(key, value_type(key, code)?);
        }
        let value_type = value_type(key, code)?;
        // llama.cpp aborts if these values have another type.
        if [SPLIT_INDEX_KEY, SPLIT_COUNT_KEY].contains(&key) && value_type != ValueType::Unsigned(2)
        {
            return Err(format!("`{key}` must be an unsigned integer of 16 bits"));
        }
        match value_type {
            ValueType::String => {
                let length = self.read_u64()?;
                if length > MAX_STRING_BYTES {
                    self.skip(length)?;
                    return Ok(Value::Unchecked);
                }
                let bytes = self.bytes(length)?;
                Ok(Value::String(String::from_utf8_lossy(&bytes).into_owned()))
            }
            integer @ (ValueType::Unsigned(_) | ValueType::Signed(_)) => {
                Ok(Value::Integer(self.integer(integer)?))
            }
            ValueType::Float(4) => Ok(Value::Float(f32::from_le_bytes(self.array()?).into())),
            ValueType::Float(_) => Ok(Value::Float(f64::from_le_bytes(self.array()?))),
            ValueType::Bool => {
                self.skip(1)?;
                Ok(Value::Unchecked)
            }
        }
    }

    fn read_array(&mut self, key: &str, element: ValueType) -> Result<Value, String> {
        let count = self.read_u64()?;
        if count.saturating_mul(element.size()) > self.remaining() {
            return Err(format!(
                "the file is truncated: its {} bytes end before the {count} values of `{key}`",
                self.length
            ));
        }
        let mut numbers = Vec::new();
        match element {
            ValueType::String if key == TOKENS_KEY => self.read_tokens(count)?,
            ValueType::String => {
                for _ in 0..count {
                    let length = self.read_u64()?;
                    self.skip(length)?;
                }
            }
            ValueType::Unsigned(_) | ValueType::Signed(_) if count <= MAX_KEPT_NUMBERS => {
                for _ in 0..count {
                    numbers.push(self.integer(element)?);
                }
            }
            ValueType::Unsigned(_)
            | ValueType::Signed(_)
            | ValueType::Float(_)
            | ValueType::Bool => {
                self.skip(count * element.size())?;
            }
        }
        Ok(Value::Array {
            element,
            count,
            numbers,
        })
    }

    /// Reads the vocabulary. llama.cpp aborts if two tokens are equal, and it renames an empty token to
    /// `[EMPTY_<index>]`.
    fn read_tokens(&mut self, count: u64) -> Result<(), String> {
        let mut seen: HashSet<Vec<u8>> = HashSet::new();
        for index in 0..count {
            let length = self.read_u64()?;
            let mut text = self.bytes(length)?;
            if text.is_empty() {
                text = format!("[EMPTY_{index}]").into_bytes();
            }
            if let Some(text) = seen.replace(text) {
                let text = String::from_utf8_lossy(&text);
                return Err(format!(
                    "`{TOKENS_KEY}` has the token {text:?} twice, the second time at index {index}"
                ));
            }
        }
        self.missing_byte = (0..=u8::MAX).find(|byte| {
            !seen.contains(format!("<0x{byte:02X}>").as_bytes()) && !seen.contains(&[*byte][..])
        });
        Ok(())
    }

    fn integer(&mut self, value_type: ValueType) -> Result<i128, String> {
        let mut bytes = [0; 16];
        let size = usize::try_from(value_type.size()).unwrap_or(8);
        self.read(&mut bytes[..size])?;
        let is_negative = matches!(value_type, ValueType::Signed(_)) && bytes[size - 1] >= 0x80;
        if is_negative {
            bytes[size..].fill(0xff);
        }
        Ok(i128::from_le_bytes(bytes))
    }

    fn tensor(&mut self) -> Result<Tensor, String> {
        let name = self.read_short_string("a tensor name")?;
        let count = self.read_u32()?;
        if count > tensors::MAX_DIMENSIONS {
            let max = tensors::MAX_DIMENSIONS;
            return Err(format!(
                "tensor `{name}` must have at most {max} dimensions (got {count})"
            ));
        }
        let dimensions = (0..count)
            .map(|_| self.read_u64())
            .collect::<Result<_, _>>()?;
        Ok(Tensor {
            name,
            dimensions,
            data_type: self.read_u32()?,
            offset: self.read_u64()?,
        })
    }
}

impl ValueType {
    /// Returns the size of a value in bytes. For a string, this is the size of its length field.
    fn size(self) -> u64 {
        let size = match self {
            Self::Unsigned(size) | Self::Signed(size) | Self::Float(size) => size,
            Self::Bool => 1,
            Self::String => 8,
        };
        u64::try_from(size).unwrap_or(u64::MAX)
    }
}

/// Converts a type code of the GGUF format.
fn value_type(key: &str, code: u32) -> Result<ValueType, String> {
    Ok(match code {
        0 => ValueType::Unsigned(1),
        1 => ValueType::Signed(1),
        2 => ValueType::Unsigned(2),
        3 => ValueType::Signed(2),
        4 => ValueType::Unsigned(4),
        5 => ValueType::Signed(4),
        6 => ValueType::Float(4),
        7 => ValueType::Bool,
        8 => ValueType::String,
        10 => ValueType::Unsigned(8),
        11 => ValueType::Signed(8),
        12 => ValueType::Float(8),
        _ => {
            return Err(format!("`{key}` has the unknown GGUF type {code}"));
        }
    })
}

#[cfg(test)]
mod tests;
