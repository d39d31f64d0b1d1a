//! The header of a GGUF file, read before llama.cpp loads the file: llama.cpp takes what the header says on trust
//! in many places, and aborts the process where it is wrong.
//!
//! Nothing is allocated by a number from the file before that number has been held against the file's size. The
//! file must not change while it is read or served: llama.cpp maps it into memory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

mod model;
mod tensors;

pub(super) use model::check_model;

/// The first bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";

/// The versions that llama.cpp reads.
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;

/// The longest key, tensor name or text that is kept; longer texts are skipped.
const MAX_TEXT: u64 = 64 * 1024;

/// The longest list of numbers that is kept: more than any model has layers.
const MAX_KEPT_NUMBERS: u64 = 4096;

/// The list of texts that must not repeat: llama.cpp looks tokens up by their text.
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Whether the file begins as GGUF files do.
///
/// # Errors
/// When it cannot be read, or does not.
pub(super) fn check_magic(path: &Path) -> Result<(), String> {
    let mut magic = [0; MAGIC.len()];
    match File::open(path).and_then(|mut file| file.read(&mut magic)) {
        Err(error) => Err(format!("the model file cannot be read: {error}")),
        Ok(_) if magic == MAGIC => Ok(()),
        Ok(_) => Err("this is not a GGUF model file".to_owned()),
    }
}

/// The header of a file.
pub(super) struct Header {
    values: HashMap<String, Value>,
    tensors: Vec<Tensor>,
    /// A byte for which the vocabulary has no token, neither `<0x0A>` nor the byte itself.
    missing_byte: Option<u8>,
}

/// A value of the metadata, as much of it as is checked.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    /// A boolean, or a text that is too long to be kept.
    Other,
    Text(String),
    List {
        element: Element,
        count: u64,
        /// The numbers of a short list of integers.
        numbers: Vec<i128>,
    },
}

/// The type of a value, or of a list's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    Unsigned(usize),
    Signed(usize),
    Float(usize),
    Bool,
    Text,
}

/// What a file says of one tensor.
struct Tensor {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    /// Bytes from the start of the data.
    offset: u64,
}

impl Header {
    /// Reads the header of a file, and checks its structure.
    ///
    /// # Errors
    /// When the file cannot be read, is no GGUF file, is cut short, or contradicts itself.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        check_magic(path)?;
        let cannot_be_read = |error: io::Error| format!("the model file cannot be read: {error}");
        let file = File::open(path).map_err(cannot_be_read)?;
        let length = file.metadata().map_err(cannot_be_read)?.len();
        Self::parse(BufReader::new(file), length)
    }

    fn parse(source: impl Read, length: u64) -> Result<Self, String> {
        let mut input = Input {
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
            return Err(format!("its GGUF version is {version}; it must be 2 or 3"));
        }
        let tensor_count = input.count("tensors", 24)?;
        let value_count = input.count("metadata values", 13)?;
        let mut values = HashMap::new();
        for _ in 0..value_count {
            let key = input.short_text("a key of the metadata")?;
            let value = input.value(&key)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("`{key}` appears twice"));
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
        tensors::check(&header, input.position, length)?;
        Ok(header)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A whole number of the metadata.
    ///
    /// # Errors
    /// When the value is another kind.
    fn integer(&self, key: &str) -> Result<Option<i128>, String> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(*value)),
            Some(_) => Err(format!("`{key}` must be a whole number")),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }
}

/// A file that is read from its start to its end, and how much of it is left.
struct Input<R> {
    source: R,
    position: u64,
    length: u64,
    missing_byte: Option<u8>,
}

impl<R: Read> Input<R> {
    fn left(&self) -> u64 {
        self.length - self.position
    }

    /// Counts these bytes as read.
    fn advance(&mut self, bytes: u64) -> Result<(), String> {
        if bytes > self.left() {
            return Err(self.truncated());
        }
        self.position += bytes;
        Ok(())
    }

    fn truncated(&self) -> String {
        let length = self.length;
        format!("the file is truncated: it ends at {length} bytes, within its header")
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

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least so many bytes each.
    fn count(&mut self, things: &str, bytes_each: u64) -> Result<u64, String> {
        let count = self.u64()?;
        if count.saturating_mul(bytes_each) > self.length {
            let length = self.length;
            return Err(format!(
                "it says that it has {count} {things}, more than its {length} bytes can hold; it is truncated or \
                 damaged"
            ));
        }
        Ok(count)
    }

    /// A text that is kept: its bytes need not be UTF-8.
    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, String> {
        if length > self.left() {
            return Err(self.truncated());
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| self.truncated())?];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn short_text(&mut self, what: &str) -> Result<String, String> {
        let length = self.u64()?;
        if length > MAX_TEXT {
            return Err(format!(
                "{what} is {length} bytes long; at most {MAX_TEXT} are allowed"
            ));
        }
        let bytes = self.bytes(length)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, key: &str) -> Result<Value, String> {
        const LIST: u32 = 9;
        let kind = self.u32()?;
        if kind == LIST {
            let kind = self.u32()?;
            return self.list(key, element(key, kind)?);
        }
        match element(key, kind)? {
            Element::Text => {
                let length = self.u64()?;
                if length > MAX_TEXT {
                    self.skip(length)?;
                    return Ok(Value::Other);
                }
                let bytes = self.bytes(length)?;
                Ok(Value::Text(String::from_utf8_lossy(&bytes).into_owned()))
            }
            number @ (Element::Unsigned(_) | Element::Signed(_)) => {
                Ok(Value::Integer(self.number(number)?))
            }
            Element::Float(4) => Ok(Value::Float(f32::from_le_bytes(self.array()?).into())),
            Element::Float(_) => Ok(Value::Float(f64::from_le_bytes(self.array()?))),
            Element::Bool => {
                self.skip(1)?;
                Ok(Value::Other)
            }
        }
    }

    fn list(&mut self, key: &str, element: Element) -> Result<Value, String> {
        let count = self.u64()?;
        if count.saturating_mul(element.size()) > self.left() {
            return Err(format!(
                "the file is truncated: it ends at {} bytes, before the {count} values of `{key}`",
                self.length
            ));
        }
        let mut numbers = Vec::new();
        match element {
            Element::Text if key == TOKENS => self.distinct_texts(count)?,
            Element::Text => {
                for _ in 0..count {
                    let length = self.u64()?;
                    self.skip(length)?;
                }
            }
            Element::Unsigned(_) | Element::Signed(_) if count <= MAX_KEPT_NUMBERS => {
                for _ in 0..count {
                    numbers.push(self.number(element)?);
                }
            }
            Element::Unsigned(_) | Element::Signed(_) | Element::Float(_) | Element::Bool => {
                self.skip(count * element.size())?;
            }
        }
        Ok(Value::List {
            element,
            count,
            numbers,
        })
    }

    /// Reads the texts of tokens. llama.cpp aborts where two are the same; it names an empty one by its index.
    fn distinct_texts(&mut self, count: u64) -> Result<(), String> {
        let mut seen: HashSet<Vec<u8>> = HashSet::new();
        for index in 0..count {
            let length = self.u64()?;
            let mut text = self.bytes(length)?;
            if text.is_empty() {
                text = format!("[EMPTY_{index}]").into_bytes();
            }
            if let Some(text) = seen.replace(text) {
                let text = String::from_utf8_lossy(&text);
                return Err(format!(
                    "`{TOKENS}` has the token {text:?} twice, the second time as {index}"
                ));
            }
        }
        self.missing_byte = (0..=u8::MAX).find(|byte| {
            !seen.contains(format!("<0x{byte:02X}>").as_bytes()) && !seen.contains(&[*byte][..])
        });
        Ok(())
    }

    fn number(&mut self, element: Element) -> Result<i128, String> {
        let mut bytes = [0; 16];
        let size = usize::try_from(element.size()).unwrap_or(8);
        self.read(&mut bytes[..size])?;
        let is_negative = matches!(element, Element::Signed(_)) && bytes[size - 1] >= 0x80;
        if is_negative {
            bytes[size..].fill(0xff);
        }
        Ok(i128::from_le_bytes(bytes))
    }

    fn tensor(&mut self) -> Result<Tensor, String> {
        let name = self.short_text("the name of a tensor")?;
        let count = self.u32()?;
        if count > tensors::MAX_DIMENSIONS {
            let max = tensors::MAX_DIMENSIONS;
            return Err(format!(
                "tensor `{name}` has {count} dimensions; at most {max} are allowed"
            ));
        }
        let dimensions = (0..count).map(|_| self.u64()).collect::<Result<_, _>>()?;
        Ok(Tensor {
            name,
            dimensions,
            kind: self.u32()?,
            offset: self.u64()?,
        })
    }
}

impl Element {
    /// Bytes of one; of a text its length alone.
    fn size(self) -> u64 {
        let size = match self {
            Self::Unsigned(size) | Self::Signed(size) | Self::Float(size) => size,
            Self::Bool => 1,
            Self::Text => 8,
        };
        u64::try_from(size).unwrap_or(u64::MAX)
    }
}

/// The type that a number in the file stands for.
fn element(key: &str, kind: u32) -> Result<Element, String> {
    Ok(match kind {
        0 => Element::Unsigned(1),
        1 => Element::Signed(1),
        2 => Element::Unsigned(2),
        3 => Element::Signed(2),
        4 => Element::Unsigned(4),
        5 => Element::Signed(4),
        6 => Element::Float(4),
        7 => Element::Bool,
        8 => Element::Text,
        10 => Element::Unsigned(8),
        11 => Element::Signed(8),
        12 => Element::Float(8),
        _ => {
            return Err(format!(
                "`{key}` is of type {kind}, which GGUF does not have"
            ));
        }
    })
}

#[cfg(test)]
mod tests;
