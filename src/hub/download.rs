//! Downloads one file into the cache. Continues an unfinished download. Checks the size and the SHA-256 before the file
//! gets its final name.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use http::{Response, StatusCode};
use ring::digest::{Context, SHA256};
use tokio::task::yield_now;
use tokio::time::sleep;

use super::cache::RepoCache;
use super::client::ResponseBody;
use super::context::{DownloadProgress, FetchContext};
use super::error::{Failure, HubError};
use super::repo_files::RepoFile;
use super::url::encode_path;
use crate::backoff::{Backoff, BackoffPolicy};

/// Number of failures after which a download fails. The count starts again when the file becomes longer than ever
/// before.
const MAX_ATTEMPTS: u32 = 5;

/// Maximum delay between two attempts.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);

/// Interval at which a process tries to take the lock of a file that another process downloads.
const LOCK_INTERVAL: Duration = Duration::from_millis(500);

/// Number of bytes that are read from the disk at once.
const CHUNK_BYTES: usize = 1024 * 1024;

/// Downloads a file of a commit unless its contents are in the cache. Returns its path.
///
/// # Errors
/// The file cannot be downloaded, or its size or SHA-256 is not the one that the Hub lists.
pub(super) async fn download(
    context: &FetchContext<'_>,
    cache: &RepoCache,
    commit: &str,
    file: &RepoFile,
) -> Result<PathBuf, HubError> {
    let Some(sha256) = &file.sha256 else {
        return Err(HubError::NoHash {
            model: context.model.to_string(),
            file: file.path.clone(),
        });
    };
    let lock = cache
        .open_lock(sha256)
        .map_err(|error| context.cache_error(error))?;
    wait_for_lock(&lock, &file.path)
        .await
        .map_err(|error| context.cache_error(error))?;
    let blob = cache.blob_path(sha256);
    if !cache.has_blob(sha256, file.size) {
        let mut download = Download {
            context,
            commit,
            file,
            sha256,
            partial: PartialFile::open(cache, sha256, file.size)
                .await
                .map_err(|error| context.cache_error(error))?,
        };
        download.receive().await?;
        download.finish(&blob)?;
    }
    let link = cache.link(commit, &file.path, sha256);
    // The lock is held until the link exists.
    drop(lock);
    link.map_err(|error| context.cache_error(error))
}

/// Takes the lock of a file's contents. Waits while another process downloads them.
async fn wait_for_lock(lock: &File, path: &str) -> io::Result<()> {
    let mut is_reported = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {}
        }
        if !is_reported {
            tracing::info!(
                file = path,
                "waiting for another process that downloads the same file"
            );
            is_reported = true;
        }
        sleep(LOCK_INTERVAL).await;
    }
}

/// A download in progress.
struct Download<'a> {
    context: &'a FetchContext<'a>,
    commit: &'a str,
    file: &'a RepoFile,
    sha256: &'a str,
    partial: PartialFile,
}

impl Download<'_> {
    /// Receives the rest of the file. Sends another request after each failure that may be temporary.
    async fn receive(&mut self) -> Result<(), HubError> {
        let mut backoff = Backoff::new(BackoffPolicy {
            first: self.context.options.retry_delay,
            max: MAX_RETRY_DELAY,
            jitter: 0.5,
        });
        let mut failures = 0;
        // A server that ignores ranges sends the first bytes again, which is no progress.
        let mut longest = self.partial.length;
        self.report_progress();
        while self.partial.length < self.file.size {
            let reason = match self.request_rest().await {
                Ok(()) => continue,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Temporary(reason)) => reason,
            };
            if self.partial.length > longest {
                longest = self.partial.length;
                failures = 0;
                backoff.reset();
            }
            failures += 1;
            if failures >= MAX_ATTEMPTS {
                return Err(HubError::Interrupted {
                    model: self.context.model.to_string(),
                    file: self.file.path.clone(),
                    received: self.partial.length,
                    size: self.file.size,
                    reason,
                });
            }
            tracing::warn!(
                file = self.file.path,
                reason,
                "a download broke and will be continued"
            );
            sleep(backoff.next_delay()).await;
        }
        Ok(())
    }

    /// Requests the bytes that are missing, and appends them to the partial file.
    async fn request_rest(&mut self) -> Result<(), Failure> {
        let context = self.context;
        let (repo, file) = (context.model.repo(), encode_path(&self.file.path));
        let path = format!("/{repo}/resolve/{}/{file}", self.commit);
        let from = Some(self.partial.length).filter(|from| *from > 0);
        let response = context.client.get(&path, from).await;
        let response = response.map_err(|error| context.request_failure(&error))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => self.check_range(&response)?,
            StatusCode::OK => {
                let length = response.headers().get(CONTENT_LENGTH);
                let length = length.and_then(|it| it.to_str().ok());
                if let Some(length) = length.filter(|it| **it != self.file.size.to_string()) {
                    return Err(self.wrong_size(length).into());
                }
                if length.is_none() && self.partial.length > 0 {
                    // A response of unknown length may be an error page, so the partial file is kept.
                    return Err(self.wrong_size("a response of unknown length").into());
                }
                // The server ignores ranges, so the response starts at the first byte.
                self.partial
                    .clear()
                    .map_err(|error| self.write_error(error))?;
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                let reason = format!(
                    "the server answers with the HTTP status {}",
                    status.as_u16()
                );
                return Err(Failure::Temporary(reason));
            }
            status => {
                let resource = format!("file {} in {repo}", self.file.path);
                return Err(context.status_error(status, resource).into());
            }
        }
        self.append(response.into_body()).await
    }

    /// Checks that a partial response has exactly the bytes that the partial file lacks.
    fn check_range(&self, response: &Response<ResponseBody>) -> Result<(), HubError> {
        let range = response.headers().get(CONTENT_RANGE);
        let range = range.and_then(|it| it.to_str().ok()).unwrap_or_default();
        let (start, last) = (self.partial.length, self.file.size - 1);
        let expected = format!("bytes {start}-{last}/{}", self.file.size);
        match range == expected {
            true => Ok(()),
            false => Err(self.wrong_size(&format!("the range '{range}' instead of '{expected}'"))),
        }
    }

    async fn append(&mut self, mut body: ResponseBody) -> Result<(), Failure> {
        let context = self.context;
        loop {
            let chunk = body.next_chunk().await;
            let chunk = chunk.map_err(|error| context.request_failure(&error))?;
            let Some(chunk) = chunk else { break };
            let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
            if length > self.file.size - self.partial.length {
                return Err(self.wrong_size("more").into());
            }
            self.partial
                .append(&chunk)
                .map_err(|error| self.write_error(error))?;
            self.report_progress();
        }
        match self.partial.length == self.file.size {
            true => Ok(()),
            false => Err(Failure::Temporary(
                "the response ended too early".to_owned(),
            )),
        }
    }

    fn report_progress(&self) {
        (self.context.progress)(DownloadProgress {
            file: &self.file.path,
            received: self.partial.length,
            size: self.file.size,
        });
    }

    fn wrong_size(&self, found: &str) -> HubError {
        HubError::WrongSize {
            model: self.context.model.to_string(),
            file: self.file.path.clone(),
            expected: self.file.size,
            found: found.to_owned(),
        }
    }

    fn write_error(&self, error: io::Error) -> HubError {
        self.context.write_error(&self.file.path, error)
    }

    /// Checks the SHA-256 of the whole file, and gives the file its name in the cache.
    fn finish(&self, blob: &Path) -> Result<(), HubError> {
        let PartialFile {
            file, path, hash, ..
        } = &self.partial;
        let found = hexadecimal(hash.clone().finish().as_ref());
        if found != self.sha256 {
            // If the file cannot be removed, the next start finds the same damage and reports it again, so this
            // error is ignored.
            let _ = fs::remove_file(path);
            return Err(HubError::WrongHash {
                model: self.context.model.to_string(),
                file: self.file.path.clone(),
                expected: self.sha256.to_owned(),
                found,
            });
        }
        // Without `sync_all`, a power failure could leave a file with the right name and without its contents.
        let stored = file.sync_all().and_then(|()| fs::rename(path, blob));
        stored.map_err(|error| self.write_error(error))
    }
}

/// The start of a file that is being downloaded, with the SHA-256 of its bytes.
struct PartialFile {
    path: PathBuf,
    file: File,
    /// Number of bytes in the file.
    length: u64,
    hash: Context,
}

impl PartialFile {
    /// Opens and hashes the unfinished file of an earlier download, or creates an empty file. Empties a file that is
    /// longer than `size`, the size of the whole file.
    async fn open(cache: &RepoCache, sha256: &str, size: u64) -> io::Result<Self> {
        let mut partial = Self {
            path: cache.incomplete_path(sha256),
            file: cache.open_incomplete(sha256)?,
            length: 0,
            hash: Context::new(&SHA256),
        };
        if partial.file.metadata()?.len() > size {
            partial.clear()?;
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = partial.file.read(&mut chunk)?;
            if count == 0 {
                return Ok(partial);
            }
            partial.add(&chunk[..count]);
            // Hashing many gigabytes takes minutes, during which a signal must still end the process.
            yield_now().await;
        }
    }

    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.length = 0;
        self.hash = Context::new(&SHA256);
        Ok(())
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.file.write_all(chunk)?;
        self.add(chunk);
        Ok(())
    }

    fn add(&mut self, chunk: &[u8]) {
        self.length += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        self.hash.update(chunk);
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
