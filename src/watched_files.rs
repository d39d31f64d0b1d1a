//! Detects that files were changed or replaced.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files, and their versions when they were last checked.
#[derive(Clone, Debug)]
pub(crate) struct WatchedFiles {
    files: Vec<(PathBuf, FileVersion)>,
}

/// Version of a file, as far as its metadata shows it. It follows links, so it also changes if a link is switched to
/// another file, as Kubernetes does for mounted secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    /// Device, inode, size, and time of the last change in seconds and nanoseconds. `None` if there is no such file.
    metadata: Option<(u64, u64, u64, i64, i64)>,
}

impl WatchedFiles {
    /// Records the present versions of files. To miss no change, call this before the files are read.
    pub(crate) fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let files = paths.into_iter().map(|path| {
            let version = FileVersion::of(&path);
            (path, version)
        });
        Self {
            files: files.collect(),
        }
    }

    /// Returns true if a file has changed since the last call, or since the files were first recorded.
    pub(crate) fn have_changed(&mut self) -> bool {
        let mut changed = false;
        for (path, known) in &mut self.files {
            let version = FileVersion::of(path);
            changed |= version != *known;
            *known = version;
        }
        changed
    }
}

impl FileVersion {
    /// Returns the present version of the file.
    fn of(path: &Path) -> Self {
        let metadata = fs::metadata(path).ok();
        Self {
            metadata: metadata
                .map(|it| (it.dev(), it.ino(), it.size(), it.mtime(), it.mtime_nsec())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_changed_replaced_or_removed_file_is_noticed_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), "1").unwrap();
        fs::write(path("b"), "1").unwrap();
        symlink(path("a"), path("link")).unwrap();
        let mut watched = WatchedFiles::new([path("other"), path("link")]);
        assert!(!watched.have_changed());

        fs::write(path("a"), "12").unwrap();
        assert!(watched.have_changed());
        assert!(!watched.have_changed());

        symlink(path("b"), path("new")).unwrap();
        fs::rename(path("new"), path("link")).unwrap();
        assert!(watched.have_changed(), "the link was switched");

        fs::remove_file(path("b")).unwrap();
        assert!(watched.have_changed(), "the file was removed");

        fs::write(path("other"), "").unwrap();
        assert!(watched.have_changed(), "a missing file was created");
        assert!(!watched.have_changed());
    }
}
