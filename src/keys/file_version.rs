//! Detects that a file was changed or replaced.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Version of a file, as far as its metadata shows it. It follows links, so it also changes if a link is switched to
/// another file, as Kubernetes does for mounted secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileVersion {
    /// Device, inode, size, and time of the last change in seconds and nanoseconds. `None` if there is no such file.
    metadata: Option<(u64, u64, u64, i64, i64)>,
}

impl FileVersion {
    /// Returns the present version of the file.
    pub(crate) fn of(path: &Path) -> Self {
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
    fn a_changed_replaced_or_removed_file_has_another_version() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), "1").unwrap();
        fs::write(path("b"), "1").unwrap();
        symlink(path("a"), path("link")).unwrap();
        let first = FileVersion::of(&path("link"));
        assert_eq!(first, FileVersion::of(&path("a")));
        fs::write(path("a"), "12").unwrap();
        let changed = FileVersion::of(&path("link"));
        assert_ne!(changed, first);
        symlink(path("b"), path("new")).unwrap();
        fs::rename(path("new"), path("link")).unwrap();
        let switched = FileVersion::of(&path("link"));
        assert_ne!(switched, changed);
        fs::remove_file(path("b")).unwrap();
        assert_ne!(FileVersion::of(&path("link")), switched);
    }
}
