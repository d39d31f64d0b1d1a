//! Checks before a download that the disk has room for it.

use std::fs;

use super::cache::RepoCache;
use super::context::FetchContext;
use super::error::HubError;
use super::repo_files::RepoFile;

/// Free space that a download leaves on the disk, in bytes.
const SPARE_BYTES: u64 = 16 * 1024 * 1024;

/// Checks that the disk has room for all bytes of these files that are not in the cache.
///
/// # Errors
/// The disk has too little room. If the free space is unknown, that is no error: the download then fails once the disk
/// is full.
pub(super) fn check_space(
    context: &FetchContext<'_>,
    cache: &RepoCache,
    files: &[&RepoFile],
) -> Result<(), HubError> {
    let missing = missing_bytes(cache, files);
    if missing == 0 {
        return Ok(());
    }
    let needed = missing.saturating_add(SPARE_BYTES);
    // Before the first download, the folder does not exist.
    let mut folders = cache.folder().ancestors();
    let disk = folders.find_map(|folder| rustix::fs::statvfs(folder).ok());
    // Some network file systems report a size of 0 because they do not know it.
    let Some(disk) = disk.filter(|disk| disk.f_blocks > 0) else {
        return Ok(());
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    match needed > free {
        false => Ok(()),
        true => Err(HubError::NoSpace {
            model: context.model.to_string(),
            needed,
            free,
            cache: context.options.cache.clone(),
        }),
    }
}

/// Returns the number of bytes that a download of these files receives.
fn missing_bytes(cache: &RepoCache, files: &[&RepoFile]) -> u64 {
    let missing = files.iter().map(|file| {
        let Some(sha256) = &file.sha256 else {
            return file.size;
        };
        if cache.has_blob(sha256, file.size) {
            return 0;
        }
        let partial = fs::metadata(cache.incomplete_path(sha256)).map_or(0, |it| it.len());
        // A partial file that is too long is downloaded again from its first byte.
        file.size.checked_sub(partial).unwrap_or(file.size)
    });
    missing.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_the_cache_are_not_missing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = RepoCache::new(folder.path(), "a/b");
        fs::create_dir_all(cache.folder().join("blobs")).expect("a folder");
        fs::write(cache.blob_path("whole"), "12345").expect("a file");
        fs::write(cache.blob_path("cut"), "1234").expect("a file");
        fs::write(cache.incomplete_path("partial"), "12").expect("a file");
        fs::write(cache.incomplete_path("too-long"), "123456").expect("a file");
        for (sha256, missing) in [
            (Some("whole"), 0),
            (Some("cut"), 5),
            (Some("partial"), 3),
            (Some("too-long"), 5),
            (Some("none"), 5),
            (None, 5),
        ] {
            let file = RepoFile {
                path: "m.gguf".to_owned(),
                size: 5,
                sha256: sha256.map(str::to_owned),
            };
            assert_eq!(missing_bytes(&cache, &[&file]), missing, "{sha256:?}");
            assert_eq!(missing_bytes(&cache, &[&file, &file]), 2 * missing);
        }
    }
}
