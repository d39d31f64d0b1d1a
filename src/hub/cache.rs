//! The cache of files from the Hugging Face Hub. Other programs share it: `huggingface_hub` for Python and llama.cpp
//! use the same folders. The crate `hf-hub` defines the names of the folders, the refs and the snapshots:
//!
//! ```text
//! models--OWNER--REPO/blobs/SHA256                the contents of each file; SHA256.incomplete while it is downloaded
//! models--OWNER--REPO/refs/main                   the commit of the last download
//! models--OWNER--REPO/snapshots/COMMIT/FILE       links to the contents
//! models--OWNER--REPO/tokenway-files/COMMIT.json  the commit's list of GGUF files, to choose a file without a network
//! .locks/models--OWNER--REPO/SHA256.lock          held by the process that downloads the file
//! ```
//!
//! The lists are not in `snapshots`, because `huggingface_hub` takes each file there for a file of the repository.

use std::cmp::Reverse;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hf_hub::{Cache, CacheRepo, Repo};
use rustix::fs::OFlags;

use super::reference::{is_relative_path, is_repo};
use super::repo_files::{RepoFile, RepoFiles, is_sha256};
use crate::gguf_name::without_extension;

/// Folder of the lists of files, within the folder of a repository.
const LISTS_FOLDER: &str = "tokenway-files";

/// Name of the branch whose commit is downloaded.
const BRANCH: &str = "main";

/// Prefix of the folders of repositories with models. `--` separates the owner and the repository.
const MODEL_FOLDER_PREFIX: &str = "models--";

/// Maximum depth of folders in a repository that are searched for models.
const MAX_DEPTH: usize = 4;

/// The cached files of one repository.
pub(super) struct RepoCache {
    layout: CacheRepo,
    /// The folder of the repository.
    folder: PathBuf,
    /// The folder of the repository's locks.
    locks: PathBuf,
}

impl RepoCache {
    /// Returns the cache of the repository `OWNER/REPO` in this cache folder.
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        let name = Repo::model(repo.to_owned()).folder_name();
        Self {
            layout: Cache::new(cache.to_owned()).model(repo.to_owned()),
            folder: cache.join(&name),
            locks: cache.join(".locks").join(name),
        }
    }

    /// The folder of the repository.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the commits that have cached files, in the order in which they are searched for a model: first the one
    /// in `refs/main`, which is the commit of the last download, then the others, the last changed first.
    pub(super) fn commits(&self) -> Vec<String> {
        let main = read_regular_file(&self.main_ref()).unwrap_or_default();
        let main = String::from_utf8_lossy(&main);
        let entries = fs::read_dir(self.folder.join("snapshots"));
        let commits = entries.into_iter().flatten().flatten().filter_map(|entry| {
            let commit = entry.file_name().into_string().ok()?;
            let metadata = fs::metadata(entry.path()).ok()?;
            let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let is_main = commit == main.trim();
            metadata
                .is_dir()
                .then_some((Reverse(is_main), Reverse(modified), commit))
        });
        let mut commits: Vec<_> = commits.collect();
        commits.sort();
        commits.into_iter().map(|(.., commit)| commit).collect()
    }

    fn list_path(&self, commit: &str) -> PathBuf {
        self.folder
            .join(LISTS_FOLDER)
            .join(format!("{commit}.json"))
    }

    /// Returns the stored list of a commit's GGUF files. `None` if Tokenway has not stored a list, or the list is not
    /// valid.
    pub(super) fn listed_files(&self, commit: &str) -> Option<RepoFiles> {
        let list = read_regular_file(&self.list_path(commit)).ok()?;
        let list: RepoFiles = serde_json::from_slice(&list).ok()?;
        let is_valid = list.commit == commit && list.files.iter().all(stays_in_cache);
        is_valid.then_some(list)
    }

    /// Stores the list of a commit's files, and writes the commit to `refs/main`.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn store_files(&self, files: &RepoFiles) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(files)?;
        text.push('\n');
        self.replace_file(&self.list_path(&files.commit), &text)?;
        self.replace_file(&self.main_ref(), &files.commit)
    }

    /// Writes a file of this repository's folder. Replaces a file, link or pipe of the same name.
    fn replace_file(&self, path: &Path, text: &str) -> io::Result<()> {
        // No other program reads this folder.
        let temporary = self.folder.join(LISTS_FOLDER);
        fs::create_dir_all(&temporary)?;
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        // Other users may share the cache. By default, only the owner could read a temporary file.
        let mut new = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(temporary)?;
        io::Write::write_all(&mut new, text.as_bytes())?;
        new.persist(path)?;
        Ok(())
    }

    fn main_ref(&self) -> PathBuf {
        self.folder.join("refs").join(BRANCH)
    }

    /// Returns the cached GGUF files of a commit. Their hashes are unknown.
    pub(super) fn cached_files(&self, commit: &str) -> RepoFiles {
        let mut files = Vec::new();
        add_model_files(&self.layout.pointer_path(commit), "", MAX_DEPTH, &mut files);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        RepoFiles {
            commit: commit.to_owned(),
            files,
        }
    }

    /// Returns the path of a file if the cache has it in its full size.
    pub(super) fn cached_path(&self, commit: &str, file: &RepoFile) -> Option<PathBuf> {
        let path = self.snapshot_path(commit, &file.path);
        let is_whole = fs::metadata(&path).is_ok_and(|it| it.is_file() && it.len() == file.size);
        is_whole.then_some(path)
    }

    fn snapshot_path(&self, commit: &str, file: &str) -> PathBuf {
        self.layout.pointer_path(commit).join(file)
    }

    /// Returns true if the cache has the contents with this hash in their full size.
    pub(super) fn has_blob(&self, sha256: &str, size: u64) -> bool {
        fs::metadata(self.blob_path(sha256)).is_ok_and(|it| it.len() == size)
    }

    /// Returns the path of the contents with this hash.
    pub(super) fn blob_path(&self, sha256: &str) -> PathBuf {
        self.folder.join("blobs").join(sha256)
    }

    /// Returns the path of the contents with this hash while they are downloaded.
    pub(super) fn incomplete_path(&self, sha256: &str) -> PathBuf {
        self.folder
            .join("blobs")
            .join(format!("{sha256}.incomplete"))
    }

    /// Creates the folders of the repository, and opens the lock of the contents with this hash.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn open_lock(&self, sha256: &str) -> io::Result<File> {
        fs::create_dir_all(self.folder.join("blobs"))?;
        fs::create_dir_all(&self.locks)?;
        open_for_writing(&self.locks.join(format!("{sha256}.lock")))
    }

    /// Opens the partial contents with this hash. Creates an empty file if there is none.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn open_incomplete(&self, sha256: &str) -> io::Result<File> {
        open_for_writing(&self.incomplete_path(sha256))
    }

    /// Links a file of a commit to its contents. Returns the path of the link.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn link(&self, commit: &str, file: &str, sha256: &str) -> io::Result<PathBuf> {
        let link = self.snapshot_path(commit, file);
        let folder = link.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder)?;
        // The link lies in `snapshots`, in the commit's folder, and in the file's own folders within the repository.
        let depth = 1 + file.split('/').count();
        let target = format!("{}blobs/{sha256}", "../".repeat(depth));
        match fs::remove_file(&link) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        std::os::unix::fs::symlink(target, &link)?;
        Ok(link)
    }
}

/// Returns true if the path of a file and the hash of its contents lead to no place outside the repository's folder.
fn stays_in_cache(file: &RepoFile) -> bool {
    let has_valid_hash = file.sha256.as_deref().is_none_or(is_sha256);
    is_relative_path(&file.path) && has_valid_hash
}

/// Opens a file for reading and writing. Creates it if it does not exist, and keeps its contents.
///
/// # Errors
/// The file cannot be opened, or it is a link or not a regular file: another user of a shared cache could have put it
/// there to have a different file overwritten.
fn open_for_writing(path: &Path) -> io::Result<File> {
    // Without `NONBLOCK`, opening a named pipe could wait forever.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let file = file.map_err(named)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(named(io::Error::other("not a regular file"))),
    }
}

/// Reads a file. Does not wait for the other end of a named pipe.
///
/// # Errors
/// The file cannot be read, or is not a regular file.
fn read_regular_file(path: &Path) -> io::Result<Vec<u8>> {
    match fs::metadata(path)?.is_file() {
        true => fs::read(path),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// Adds the GGUF files below a folder of a snapshot, without those that no name selects. `prefix` is the path of the
/// folder in the repository.
fn add_model_files(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<RepoFile>) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // Files are links to their contents; folders are not links.
        let is_folder = entry.file_type().is_ok_and(|it| it.is_dir());
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        let path = format!("{prefix}{name}");
        if is_folder && depth > 0 {
            add_model_files(&entry.path(), &format!("{path}/"), depth - 1, files);
        } else if metadata.is_file()
            && without_extension(&name).is_some()
            && is_relative_path(&path)
        {
            files.push(RepoFile {
                path,
                size: metadata.len(),
                sha256: None,
            });
        }
    }
}

/// Returns the repositories that have a folder in the cache, as `OWNER/REPO`, in alphabetical order. Leaves out folders
/// with names that no repository on the Hub can have.
///
/// # Errors
/// The cache folder exists and cannot be read.
pub(super) fn cached_repos(cache: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(cache) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut repos = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let repo = name
            .to_str()
            .and_then(|it| it.strip_prefix(MODEL_FOLDER_PREFIX));
        let repo = repo.and_then(|repo| repo.split_once("--"));
        let repo = repo.map(|(owner, name)| format!("{owner}/{name}"));
        repos.extend(repo.filter(|repo| is_repo(repo)));
    }
    repos.sort();
    Ok(repos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stays_in_the_cache_if_its_path_and_its_hash_do() {
        let file = |path: &str, sha256: Option<&str>| RepoFile {
            path: path.to_owned(),
            size: 1,
            sha256: sha256.map(str::to_owned),
        };
        let hash = "ab".repeat(32);
        assert!(stays_in_cache(&file("a/m.gguf", Some(&hash))));
        assert!(stays_in_cache(&file("m.gguf", None)));
        assert!(!stays_in_cache(&file("../m.gguf", Some(&hash))));
        assert!(!stays_in_cache(&file("m.gguf", Some("../../m"))));
    }
}
