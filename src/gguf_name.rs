//! Names of GGUF files: the parts of a split model, and the quantization. This module must not open files.

/// End of the name of a GGUF file.
pub(crate) const EXTENSION: &str = ".gguf";

/// Prefixes of quantizations, such as `Q4_K_M`, `IQ2_XXS` or `BF16`. A digit follows the prefix.
const QUANTIZATIONS: [&str; 7] = ["Q", "IQ", "TQ", "F", "BF", "MXFP", "NVFP"];

/// Prefix of a quantization that varies between the layers, such as `UD-Q4_K_XL`.
const DYNAMIC_PREFIX: &str = "UD-";

/// Maximum number of parts of a split model. llama.cpp stores the count as 16 bits.
const MAX_PARTS: u32 = 65_535;

/// The position of a file in a split model: part 2 of 3 for `model-00002-of-00003.gguf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SplitPart<'a> {
    /// The name without the part number and the extension, such as `model`.
    pub(crate) prefix: &'a str,
    /// Number of the part, from 1.
    pub(crate) number: u32,
    /// Number of parts.
    pub(crate) count: u32,
}

impl<'a> SplitPart<'a> {
    /// Parses the name or the path of a file. Returns `None` if the name has no valid part number.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let (rest, count) = without_extension(name)?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let part = Self {
            prefix,
            number: five_digits(number)?,
            count: five_digits(count)?,
        };
        let is_valid = part.count <= MAX_PARTS && (1..=part.count).contains(&part.number);
        is_valid.then_some(part)
    }

    /// Returns the names of all parts, in order.
    pub(crate) fn all(&self) -> impl Iterator<Item = String> + use<'a> {
        let Self { prefix, count, .. } = *self;
        (1..=count).map(move |number| format!("{prefix}-{number:05}-of-{count:05}{EXTENSION}"))
    }
}

fn five_digits(text: &str) -> Option<u32> {
    let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// Returns the name of a model file without `.gguf` and without the part number of a split model.
pub(crate) fn model_stem(name: &str) -> &str {
    match SplitPart::parse(name) {
        Some(part) => part.prefix,
        None => without_extension(name).unwrap_or(name),
    }
}

/// Removes `.gguf`, in upper or lower case. Returns `None` for any other file.
pub(crate) fn without_extension(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(EXTENSION.len())?;
    let (stem, extension) = name.split_at_checked(at)?;
    extension.eq_ignore_ascii_case(EXTENSION).then_some(stem)
}

/// Returns the quantization at the end of a model file's name, in upper case, such as `Q4_K_M` or `UD-Q4_K_XL`.
pub(crate) fn quantization(name: &str) -> Option<String> {
    let stem = model_stem(name).to_ascii_uppercase();
    let at = stem.rfind(['-', '.', '/']).map_or(0, |at| at + 1);
    let (before, word) = stem.split_at(at);
    let is_named = QUANTIZATIONS.iter().any(|start| {
        let rest = word.strip_prefix(start);
        rest.is_some_and(|rest| rest.starts_with(|it: char| it.is_ascii_digit()))
    });
    let prefix = match before.ends_with(DYNAMIC_PREFIX) {
        true => DYNAMIC_PREFIX,
        false => "",
    };
    is_named.then(|| format!("{prefix}{word}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_split_model_knows_the_names_of_all_parts() {
        let part = SplitPart::parse("Q8_0/model-Q8_0-00002-of-00003.gguf").unwrap();
        assert_eq!((part.prefix, part.number), ("Q8_0/model-Q8_0", 2));
        let names: Vec<_> = part.all().collect();
        assert_eq!(names.len(), 3);
        assert_eq!(names[2], "Q8_0/model-Q8_0-00003-of-00003.gguf");
    }

    #[test]
    fn a_name_without_valid_part_numbers_is_a_whole_model() {
        for name in [
            "model.gguf",
            "model-00001-of-00002.bin",
            "model-1-of-2.gguf",
            "model-00000-of-00002.gguf",
            "model-00003-of-00002.gguf",
            "model-+0001-of-00002.gguf",
            "é.gguf",
            "",
        ] {
            assert_eq!(SplitPart::parse(name), None, "{name}");
        }
    }

    #[test]
    fn the_stem_has_neither_extension_nor_part_number() {
        assert_eq!(model_stem("a-Q8_0-00001-of-00002.gguf"), "a-Q8_0");
        assert_eq!(model_stem("a.Q4_1.GGUF"), "a.Q4_1");
        assert_eq!(model_stem("a.bin"), "a.bin");
    }

    #[test]
    fn the_quantization_is_the_last_word_of_the_name() {
        for (name, expected) in [
            ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", Some("Q4_K_M")),
            ("SmolLM2-135M-Instruct.Q4_1.gguf", Some("Q4_1")),
            ("phi-4-q4.gguf", Some("Q4")),
            ("Qwen3-UD-Q4_K_XL.gguf", Some("UD-Q4_K_XL")),
            ("BF16/Qwen3-BF16-00001-of-00002.gguf", Some("BF16")),
            ("gpt-oss-mxfp4.gguf", Some("MXFP4")),
            ("a/iq2_xxs.gguf", Some("IQ2_XXS")),
            ("Qwen.gguf", None),
            ("model-Fast.gguf", None),
        ] {
            assert_eq!(quantization(name).as_deref(), expected, "{name}");
        }
    }
}
