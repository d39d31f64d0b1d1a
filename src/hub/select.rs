//! Chooses the files of a model from the list of its repository's files. This module must not know where the list comes
//! from.
//!
//! The default is that of llama.cpp's `-hf`: `Q4_K_M`, then `Q8_0`. If the repository has neither, llama.cpp takes the
//! first file. Here, several possible models are an error that lists them.

use std::collections::BTreeMap;

use super::reference::{FileChoice, HUB_PREFIX, HubModel};
use super::repo_files::RepoFile;
use crate::gguf_name::{SplitPart, model_stem, quantization, without_extension};

/// Default quantizations in order of preference.
const DEFAULT_QUANTIZATIONS: [&str; 2] = ["Q4_K_M", "Q8_0"];

/// Markers in the names of GGUF files that are no language models: image projectors, importance matrices, and draft
/// models for speculative decoding. llama.cpp ignores the same files.
const OTHER_FILES: [&str; 6] = ["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];

/// Maximum number of models that an error lists.
const MAX_LISTED: usize = 20;

/// Reason why no model of a repository was chosen.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// The repository has no GGUF model.
    #[error(
        "the repository has no GGUF model; look for a repository whose name ends in -GGUF, or convert the model"
    )]
    NoModel,
    /// The repository does not have the selected file or quantization.
    #[error("the repository has no {wanted}; it has {}", list(.found))]
    NotFound {
        /// The quantization or file.
        wanted: String,
        /// Names of the models that the repository has.
        found: Vec<String>,
    },
    /// Several models match the selected quantization.
    #[error("{wanted} matches several models; name one of the files: {}", list(.found))]
    Ambiguous {
        /// The quantization.
        wanted: String,
        /// Names of the models that match.
        found: Vec<String>,
    },
    /// The repository has several models, and none of them is the default.
    #[error("the repository has several models; name a quantization or a file: {}", list(.0))]
    Undecided(Vec<String>),
    /// Parts of a split model are missing.
    #[error("the model is incomplete: the repository lacks {}", list(.0))]
    MissingParts(Vec<String>),
}

fn list(models: &[String]) -> String {
    let mut shown = models[..models.len().min(MAX_LISTED)].join(", ");
    if let Some(more @ 1..) = models.len().checked_sub(MAX_LISTED) {
        shown.push_str(&format!(" and {more} more"));
    }
    shown
}

/// Chooses the files of the model: one file, or all parts of a split model in order.
///
/// # Errors
/// No model matches, or several do. The error lists them as the user can type them.
pub(super) fn select<'a>(
    model: &HubModel,
    files: &'a [RepoFile],
) -> Result<Vec<&'a RepoFile>, SelectError> {
    let models = Candidate::all(files);
    let names = |found: &[&Candidate<'_>]| found.iter().map(|it| it.name(model.repo())).collect();
    let all: Vec<_> = models
        .values()
        .filter(|it| it.is_language_model())
        .collect();
    match model.choice() {
        FileChoice::File(path) => match models.get(&*candidate_key(path)) {
            Some(found) => found.parts(),
            None if all.is_empty() => Err(SelectError::NoModel),
            None => Err(SelectError::NotFound {
                wanted: format!("file {path}"),
                found: names(&all),
            }),
        },
        _ if all.is_empty() => Err(SelectError::NoModel),
        FileChoice::Quantization(wanted) => match &with_quantization(&all, wanted)[..] {
            [found] => found.parts(),
            [] => Err(SelectError::NotFound {
                wanted: format!("model with the quantization {wanted}"),
                found: names(&all),
            }),
            found => Err(SelectError::Ambiguous {
                wanted: wanted.clone(),
                found: names(found),
            }),
        },
        FileChoice::Default => {
            if let [only] = &all[..] {
                return only.parts();
            }
            let mut defaults = DEFAULT_QUANTIZATIONS.iter();
            let chosen = defaults.find_map(|wanted| {
                let found = with_quantization(&all, wanted);
                (!found.is_empty()).then_some((*wanted, found))
            });
            match chosen {
                None => Err(SelectError::Undecided(names(&all))),
                Some((_, found)) if found.len() == 1 => found[0].parts(),
                Some((wanted, found)) => Err(SelectError::Ambiguous {
                    wanted: format!("the default quantization {wanted}"),
                    found: names(&found),
                }),
            }
        }
    }
}

/// A model among the files of a repository.
pub(super) struct ListedModel<'a> {
    /// The name that selects it.
    pub(super) name: HubModel,
    /// Its quantization, such as `Q4_K_M`, if the name of the file ends with one.
    pub(super) quantization: Option<String>,
    /// Its files: one file, or all parts of a split model.
    pub(super) files: Vec<&'a RepoFile>,
}

/// Returns the language models of which no file is missing.
pub(super) fn models<'a>(repo: &str, files: &'a [RepoFile]) -> Vec<ListedModel<'a>> {
    let models = Candidate::all(files).into_values();
    let models = models.filter(Candidate::is_language_model);
    let listed = models.filter_map(|model| {
        Some(ListedModel {
            files: model.parts().ok()?,
            name: HubModel::file(repo, &model.path),
            quantization: quantization(&model.path),
        })
    });
    listed.collect()
}

fn with_quantization<'a, 'b>(models: &[&'b Candidate<'a>], wanted: &str) -> Vec<&'b Candidate<'a>> {
    let models = models.iter().copied();
    models.filter(|it| it.has_quantization(wanted)).collect()
}

/// A model of the repository: one file, or the parts of a split model.
struct Candidate<'a> {
    /// Path of the file, or of the first part.
    path: String,
    /// Files by part number. The file of a model that is not split has the number 1.
    files: BTreeMap<u32, &'a RepoFile>,
}

/// Returns the path of the first file of the model that a file belongs to. It identifies the model.
fn candidate_key(path: &str) -> String {
    let split = SplitPart::parse(path);
    let first = split.and_then(|part| part.all().next());
    first.unwrap_or_else(|| path.to_owned())
}

impl<'a> Candidate<'a> {
    /// Groups the GGUF files of a repository into models, by the path of each model's first file.
    fn all(files: &'a [RepoFile]) -> BTreeMap<String, Self> {
        let mut models: BTreeMap<String, Self> = BTreeMap::new();
        for file in files {
            if without_extension(&file.path).is_none() {
                continue;
            }
            let path = candidate_key(&file.path);
            let number = SplitPart::parse(&file.path).map_or(1, |part| part.number);
            let model = models.entry(path.clone()).or_insert_with(|| Self {
                path,
                files: BTreeMap::new(),
            });
            model.files.insert(number, file);
        }
        models
    }

    fn is_language_model(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path);
        !OTHER_FILES.iter().any(|other| name.contains(other))
    }

    /// Returns true if the name of the file or of a folder ends with this quantization.
    fn has_quantization(&self, wanted: &str) -> bool {
        let wanted = wanted.to_ascii_lowercase();
        let mut names = model_stem(&self.path).split('/');
        names.any(|name| {
            let name = name.to_ascii_lowercase();
            let before = name.strip_suffix(&wanted);
            before.is_some_and(|before| before.is_empty() || before.ends_with(['-', '.', '_']))
        })
    }

    /// Returns the name that selects this model, followed by its quantization in parentheses.
    fn name(&self, repo: &str) -> String {
        let quantization = quantization(&self.path);
        let quantization = quantization.map_or_else(String::new, |it| format!(" ({it})"));
        format!("{HUB_PREFIX}{repo}:{}{quantization}", self.path)
    }

    fn parts(&self) -> Result<Vec<&'a RepoFile>, SelectError> {
        let Some(split) = SplitPart::parse(&self.path) else {
            return Ok(self.files.values().copied().collect());
        };
        let missing = (1..).zip(split.all());
        let missing = missing.filter(|(number, _)| !self.files.contains_key(number));
        let missing: Vec<_> = missing.map(|(_, path)| path).collect();
        match missing.is_empty() {
            true => Ok(self.files.values().copied().collect()),
            false => Err(SelectError::MissingParts(missing)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<RepoFile> {
        let file = |path: &&str| RepoFile {
            path: (*path).to_owned(),
            size: 1,
            sha256: None,
        };
        paths.iter().map(file).collect()
    }

    /// Selects a model of the repository `a/b`, and returns the paths of its files.
    fn selected(choice: &str, paths: &[&str]) -> Result<Vec<String>, SelectError> {
        let model: HubModel = format!("hf:a/b{choice}").parse().expect("a valid name");
        let files = files(paths);
        let selected = select(&model, &files)?;
        Ok(selected.into_iter().map(|file| file.path.clone()).collect())
    }

    fn assert_selected(choice: &str, paths: &[&str], expected: &[&str]) {
        let expected = expected.iter().map(|path| (*path).to_owned()).collect();
        assert_eq!(
            selected(choice, paths),
            Ok(expected),
            "{choice} of {paths:?}"
        );
    }

    const REPO: [&str; 7] = [
        "README.md",
        "m-Q4_0.gguf",
        "m-Q4_K_M.gguf",
        "m-Q8_0-00001-of-00002.gguf",
        "m-Q8_0-00002-of-00002.gguf",
        "m-UD-Q4_K_XL.gguf",
        "mmproj-m-F16.gguf",
    ];

    #[test]
    fn the_default_is_the_only_model_then_q4_k_m_then_q8_0() {
        assert_selected("", &["a.txt", "m-F16.gguf", "mmproj.gguf"], &["m-F16.gguf"]);
        assert_selected("", &REPO, &["m-Q4_K_M.gguf"]);
        let without_q4 = ["m-Q4_0.gguf", "m-Q8_0.gguf", "m-F16.gguf"];
        assert_selected("", &without_q4, &["m-Q8_0.gguf"]);
    }

    #[test]
    fn no_default_is_an_error_that_lists_the_models() {
        let error = selected("", &["m-Q4_0.gguf", "m-F16.gguf"]).expect_err("several models");
        assert_eq!(
            error.to_string(),
            "the repository has several models; name a quantization or a file: \
             hf:a/b:m-F16.gguf (F16), hf:a/b:m-Q4_0.gguf (Q4_0)"
        );
        assert_eq!(
            selected("", &["a.txt", "mmproj.gguf"]),
            Err(SelectError::NoModel)
        );
        assert_eq!(selected(":Q8_0", &[]), Err(SelectError::NoModel));
    }

    #[test]
    fn a_quantization_selects_one_model_in_upper_or_lower_case() {
        assert_selected(":q4_0", &REPO, &["m-Q4_0.gguf"]);
        assert_selected(":UD-Q4_K_XL", &REPO, &["m-UD-Q4_K_XL.gguf"]);
        assert_selected(
            ":q4_1",
            &["model.Q4_1.gguf", "q4_k.gguf"],
            &["model.Q4_1.gguf"],
        );
        assert_selected(":Q4_K", &["a.gguf", "q4_k.gguf"], &["q4_k.gguf"]);
        let in_folders = ["BF16/m-00001-of-00001.gguf", "Q4_0/m.gguf"];
        assert_selected(":bf16", &in_folders, &in_folders[..1]);
    }

    #[test]
    fn a_quantization_that_is_missing_or_ambiguous_is_an_error() {
        let error = selected(":Q4_XS", &["m-IQ4_XS.gguf"]).expect_err("another quantization");
        assert!(matches!(error, SelectError::NotFound { .. }), "{error}");
        let error = selected(":Q5_K_M", &REPO).expect_err("missing");
        let error = error.to_string();
        let expected =
            "the repository has no model with the quantization Q5_K_M; it has hf:a/b:m-Q4_0.gguf";
        assert!(error.starts_with(expected), "{error}");
        assert!(!error.contains("mmproj"), "{error}");
        let error = selected(":0", &REPO).expect_err("several models end in 0");
        assert!(matches!(error, SelectError::Ambiguous { .. }), "{error}");
        let several = ["x-Q4_K_M.gguf", "y-Q4_K_M.gguf", "y-Q8_0.gguf"];
        for choice in ["", ":Q4_K_M"] {
            let error = selected(choice, &several)
                .expect_err("ambiguous")
                .to_string();
            let expected =
                "name one of the files: hf:a/b:x-Q4_K_M.gguf (Q4_K_M), hf:a/b:y-Q4_K_M.gguf";
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn all_parts_of_a_split_model_are_selected_in_their_order() {
        let parts = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"];
        for choice in [
            ":Q8_0",
            ":m-Q8_0-00001-of-00002.gguf",
            ":m-Q8_0-00002-of-00002.gguf",
        ] {
            assert_selected(choice, &REPO, &parts);
        }
        assert_selected(":Q8_0", &[parts[1], parts[0]], &parts);
    }

    #[test]
    fn a_split_model_without_all_parts_is_an_error_that_names_the_missing_ones() {
        let found = ["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"];
        let error = selected(":Q8_0", &found).expect_err("incomplete");
        let missing = "m-Q8_0-00002-of-00003.gguf".to_owned();
        assert_eq!(error, SelectError::MissingParts(vec![missing]));
    }

    #[test]
    fn a_file_is_selected_by_its_path_only() {
        assert_selected(":mmproj-m-F16.gguf", &REPO, &["mmproj-m-F16.gguf"]);
        let error = selected(":Q4_K_M.gguf", &REPO).expect_err("no such file");
        assert!(matches!(error, SelectError::NotFound { .. }), "{error}");
    }

    #[test]
    fn a_file_of_a_repository_without_models_is_an_error_that_says_so() {
        for files in [&["README.md", "model.safetensors"][..], &["mmproj.gguf"]] {
            assert_eq!(selected(":m.gguf", files), Err(SelectError::NoModel));
        }
    }
}
