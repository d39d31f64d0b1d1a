//! The name of a model on the Hugging Face Hub: `hf:OWNER/REPO`, `hf:OWNER/REPO:QUANTIZATION` or
//! `hf:OWNER/REPO:FILE.gguf`.

use std::fmt;
use std::str::FromStr;

use crate::gguf_name::{model_stem, without_extension};

/// Start of the name of a model on the Hub.
pub const HUB_PREFIX: &str = "hf:";

/// The forms of a name, for error messages.
const FORMS: &str = "write hf:OWNER/REPO, hf:OWNER/REPO:QUANTIZATION or hf:OWNER/REPO:FILE.gguf";

/// Maximum length in bytes of an owner or of a repository's name, which the Hub limits to 96 characters.
const MAX_NAME_BYTES: usize = 96;

/// Maximum length of a quantization in bytes.
const MAX_QUANTIZATION_BYTES: usize = 32;

/// Maximum length of a file's path in bytes.
const MAX_FILE_BYTES: usize = 512;

/// A model in a repository of the Hugging Face Hub. `Display` writes its name as users type it, without the prefix
/// `hf:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubModel {
    repo: String,
    choice: FileChoice,
}

/// The file of a repository that a name selects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileChoice {
    /// The default: the only model, else `Q4_K_M`, else `Q8_0`.
    Default,
    /// The file of this quantization, such as `Q4_K_M`, in upper or lower case.
    Quantization(String),
    /// The file at this path, or the split model that it is a part of.
    File(String),
}

impl HubModel {
    /// Selects a file of the repository `OWNER/REPO` by its path.
    #[must_use]
    pub fn file(repo: &str, path: &str) -> Self {
        Self {
            repo: repo.to_owned(),
            choice: FileChoice::File(path.to_owned()),
        }
    }

    /// The repository, `OWNER/REPO`.
    #[must_use]
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// The selected file.
    #[must_use]
    pub fn choice(&self) -> &FileChoice {
        &self.choice
    }

    /// Returns the name by which requests select the model by default: `OWNER/REPO`, `OWNER/REPO:QUANTIZATION`, or the
    /// name of the selected file without `.gguf` and without the number of a part.
    #[must_use]
    pub fn default_name(&self) -> String {
        match &self.choice {
            FileChoice::Default | FileChoice::Quantization(_) => self.to_string(),
            FileChoice::File(path) => {
                let name = path.rsplit('/').next().unwrap_or(path);
                model_stem(name).to_owned()
            }
        }
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.choice {
            FileChoice::Default => f.write_str(&self.repo),
            FileChoice::Quantization(choice) | FileChoice::File(choice) => {
                write!(f, "{}:{choice}", self.repo)
            }
        }
    }
}

/// Parses a name with its prefix `hf:`.
impl FromStr for HubModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = |problem: &str| format!("{problem} (got {text}); {FORMS}");
        let name = text.strip_prefix(HUB_PREFIX).ok_or_else(|| {
            invalid("the name of a model on the Hugging Face Hub starts with hf:")
        })?;
        let (repo, choice) = match name.split_once(':') {
            None => (name, None),
            Some((repo, choice)) => (repo, Some(choice)),
        };
        if !repo.contains('/') {
            return Err(invalid("the repository's owner is missing"));
        }
        if !is_repo(repo) {
            return Err(invalid(
                "the owner and the repository must consist of letters, digits, '-', '_' and '.', without '--' or '..'",
            ));
        }
        let choice = match choice {
            None => FileChoice::Default,
            Some(path) if without_extension(path).is_some() => {
                if !is_relative_path(path) {
                    return Err(invalid("the file must be a path within the repository"));
                }
                FileChoice::File(path.to_owned())
            }
            Some(quantization) if is_quantization(quantization) => {
                FileChoice::Quantization(quantization.to_owned())
            }
            Some(_) => {
                return Err(invalid(
                    "after the repository, write a quantization, such as Q4_K_M, or a file that ends in .gguf",
                ));
            }
        };
        Ok(Self {
            repo: repo.to_owned(),
            choice,
        })
    }
}

/// Returns true for the name of a repository with its owner: `OWNER/REPO`.
pub(super) fn is_repo(repo: &str) -> bool {
    let names = repo.split_once('/');
    names.is_some_and(|(owner, name)| is_repo_name(owner) && is_repo_name(name))
}

/// Returns true for a valid name of an owner or a repository. The Hub allows neither `..` nor `--`. The cache separates
/// the two names by `--`.
fn is_repo_name(name: &str) -> bool {
    let is_bounded = (1..=MAX_NAME_BYTES).contains(&name.len());
    is_bounded && is_name(name) && !name.contains("--") && !name.contains("..") && name != "."
}

fn is_quantization(text: &str) -> bool {
    (1..=MAX_QUANTIZATION_BYTES).contains(&text.len()) && is_name(text)
}

fn is_name(text: &str) -> bool {
    let is_allowed = |it: u8| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'_' | b'.');
    text.bytes().all(is_allowed)
}

/// Returns true for a path that stays within the folder that it is joined to.
pub(super) fn is_relative_path(path: &str) -> bool {
    let mut components = path.split('/');
    let is_bounded = (1..=MAX_FILE_BYTES).contains(&path.len());
    is_bounded
        && components.all(|it| !it.is_empty() && it != "." && it != "..")
        && !path.contains(|it: char| it.is_control() || it == '\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> HubModel {
        text.parse().expect("a valid name")
    }

    #[test]
    fn a_name_selects_the_default_a_quantization_or_a_file() {
        for (text, repo, choice, name) in [
            ("hf:a/b", "a/b", FileChoice::Default, "a/b"),
            (
                "hf:a.x/b-1_GGUF:q4_k_m",
                "a.x/b-1_GGUF",
                FileChoice::Quantization("q4_k_m".to_owned()),
                "a.x/b-1_GGUF:q4_k_m",
            ),
            (
                "hf:a/b:Q8_0/m-Q8_0-00001-of-00002.gguf",
                "a/b",
                FileChoice::File("Q8_0/m-Q8_0-00001-of-00002.gguf".to_owned()),
                "m-Q8_0",
            ),
        ] {
            let model = parse(text);
            assert_eq!((model.repo(), model.choice()), (repo, &choice));
            assert_eq!(model.default_name(), name);
            assert_eq!(format!("hf:{model}"), text);
        }
    }

    #[test]
    fn a_name_that_could_leave_the_cache_or_the_repository_is_rejected() {
        for text in [
            "a/b",
            "hf:",
            "hf:a",
            "hf:a/",
            "hf:/b",
            "hf:a/b/c",
            "hf:a/b:",
            "hf:a/..",
            "hf:./b",
            "hf:a--b/c",
            "hf:a/b c",
            "hf:a/b?x",
            "hf:a/b:Q4/K",
            "hf:a/b:/etc/m.gguf",
            "hf:a/b:../m.gguf",
            "hf:a/b:x/../m.gguf",
            "hf:a/b:x//m.gguf",
            "hf:a/b:x\\m.gguf",
            "hf:a/b:x\nm.gguf",
        ] {
            let error = text.parse::<HubModel>().expect_err(text);
            assert!(error.contains("hf:OWNER/REPO"), "{error}");
        }
    }
}
