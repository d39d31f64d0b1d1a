//! The GGUF files of a repository at one commit, as the Hub's API lists them.

use serde::{Deserialize, Serialize};

use super::reference::is_relative_path;
use crate::gguf_name::without_extension;

/// Length of a SHA-256 in hexadecimal digits.
const SHA256_DIGITS: usize = 64;

/// The GGUF files of a repository at one commit. The cache keeps this list for each commit, so that a name selects the
/// same file with and without a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RepoFiles {
    /// Hash of the commit.
    pub(super) commit: String,
    pub(super) files: Vec<RepoFile>,
}

/// A GGUF file of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RepoFile {
    /// Path within the repository, such as `Q8_0/model-Q8_0-00001-of-00002.gguf`.
    pub(super) path: String,
    /// Size in bytes.
    pub(super) size: u64,
    /// SHA-256 of the contents, in lower-case hexadecimal digits. `None` if the Hub stores the file in Git itself,
    /// which it does for small files only.
    pub(super) sha256: Option<String>,
}

/// The response of `GET /api/models/{repo}/revision/{revision}?blobs=true`.
#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<LfsPointer>,
}

/// A file in the Hub's large file storage.
#[derive(Deserialize)]
struct LfsPointer {
    sha256: String,
    size: u64,
}

impl RepoFiles {
    /// Parses the response of the Hub's API. Drops files of other kinds, and those whose paths would leave the cache.
    ///
    /// # Errors
    /// The response is not valid JSON, or a commit, size or SHA-256 is missing or invalid.
    pub(super) fn parse(response: &[u8]) -> Result<Self, String> {
        let info: ModelInfo =
            serde_json::from_slice(response).map_err(|error| error.to_string())?;
        if !is_hexadecimal(&info.sha) || info.sha.is_empty() {
            return Err(format!("`sha` must be a commit (got {:?})", info.sha));
        }
        let mut files = Vec::new();
        for sibling in info.siblings {
            let is_model = without_extension(&sibling.rfilename).is_some();
            if !(is_model && is_relative_path(&sibling.rfilename)) {
                continue;
            }
            let Sibling {
                rfilename,
                size,
                lfs,
            } = sibling;
            let sha256 = lfs.as_ref().map(|lfs| lfs.sha256.to_ascii_lowercase());
            if let Some(sha256) = &sha256
                && !is_sha256(sha256)
            {
                return Err(format!(
                    "`lfs.sha256` of {rfilename} must be a SHA-256 (got {sha256:?})"
                ));
            }
            let size = lfs.map(|lfs| lfs.size).or(size);
            files.push(RepoFile {
                size: size.ok_or_else(|| format!("`size` of {rfilename} is missing"))?,
                path: rfilename,
                sha256,
            });
        }
        Ok(Self {
            commit: info.sha,
            files,
        })
    }
}

/// Returns true for a SHA-256 in hexadecimal digits.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == SHA256_DIGITS && is_hexadecimal(text)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_response_of_the_hub_is_parsed() {
        let sha256 = "AB".repeat(32);
        let response = json!({
            "id": "a/b",
            "sha": "c0ffee",
            "siblings": [
                {"rfilename": "README.md"},
                {"rfilename": "small.gguf", "size": 5, "blobId": "x"},
                {"rfilename": "m.gguf", "size": 9, "lfs": {"sha256": sha256, "size": 9, "pointerSize": 1}},
                {"rfilename": "../m.gguf", "size": 9},
            ],
        });
        let files = RepoFiles::parse(response.to_string().as_bytes()).unwrap();
        assert_eq!(files.commit, "c0ffee");
        let [small, model] = &files.files[..] else {
            panic!("{files:?}");
        };
        assert_eq!(
            (&*small.path, small.size, &small.sha256),
            ("small.gguf", 5, &None)
        );
        let lower = sha256.to_ascii_lowercase();
        assert_eq!((model.size, &model.sha256), (9, &Some(lower)));
    }

    #[test]
    fn a_response_that_names_no_commit_size_or_hash_is_rejected() {
        let file = |fields| json!({"sha": "c0ffee", "siblings": [fields]});
        for (response, expected) in [
            (json!({"siblings": []}), "missing field `sha`"),
            (json!({"sha": "../x"}), "`sha` must be a commit"),
            (file(json!({"rfilename": "m.gguf"})), "`size` of m.gguf"),
            (
                file(json!({"rfilename": "m.gguf", "lfs": {"sha256": "../x", "size": 1}})),
                "must be a SHA-256",
            ),
        ] {
            let error = RepoFiles::parse(response.to_string().as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
