//! Finds the files of a model in the cache, or downloads them from the Hub.
//!
//! A model in the cache is used without any request, whatever commit it is from, so a server can start without a
//! network. A newer commit on the Hub changes nothing until a program downloads from it into the cache.

use std::collections::BTreeSet;
use std::path::PathBuf;

use http::StatusCode;

use super::cache::RepoCache;
use super::client::{ClientError, HubClient};
use super::context::{DownloadProgress, FetchContext};
use super::download::download;
use super::error::HubError;
use super::options::HubOptions;
use super::reference::{FileChoice, HUB_PREFIX, HubModel};
use super::repo_files::RepoFiles;
use super::select::{models, select};
use super::space::check_space;

/// Maximum length of the Hub's list of a repository's files, in bytes.
const MAX_LIST_BYTES: usize = 32 * 1024 * 1024;

/// Returns the path of the model's file in the cache. For a split model, this is the first file. Downloads the files
/// that are not in the cache, and calls `progress` for each chunk that arrives.
///
/// # Errors
/// The model is not available. The error says why and what to do.
pub async fn fetch(
    model: &HubModel,
    options: &HubOptions,
    progress: &(dyn Fn(DownloadProgress<'_>) + Sync),
) -> Result<PathBuf, HubError> {
    let cache = RepoCache::new(&options.cache, model.repo());
    if let Some(path) = find_cached(&cache, model) {
        return Ok(path);
    }
    let context = FetchContext {
        model,
        options,
        client: HubClient::new(options),
        progress,
    };
    if options.is_offline {
        return Err(HubError::Offline {
            model: model.to_string(),
            cache: options.cache.clone(),
            hint: cached_hint(&cache, model.repo()),
        });
    }
    let files = match context.list_files().await {
        Ok(files) => files,
        Err(HubError::Unreachable {
            model,
            cache: folder,
            reason,
        }) => {
            let hint = cached_hint(&cache, context.model.repo());
            return Err(HubError::Unreachable {
                model,
                cache: folder,
                reason: format!("{reason}{hint}"),
            });
        }
        Err(error) => return Err(error),
    };
    context.download_all(&cache, &files).await
}

/// Returns the path of a model's first file if all its files are in the cache, for the same commit.
fn find_cached(cache: &RepoCache, model: &HubModel) -> Option<PathBuf> {
    let commits = cache.commits();
    commits.iter().find_map(|commit| {
        if let Some(listed) = cache.listed_files(commit) {
            return cached_path(cache, model, &listed);
        }
        if *model.choice() == FileChoice::Default {
            // The commit may have a file that is preferred to the cached ones.
            return None;
        }
        let path = cached_path(cache, model, &cache.cached_files(commit))?;
        let file = path.display();
        tracing::info!(%file, "chose a cached file without the list of the repository's files");
        Some(path)
    })
}

/// Returns the path of the first file of the model among these files if all its files are in the cache.
fn cached_path(cache: &RepoCache, model: &HubModel, files: &RepoFiles) -> Option<PathBuf> {
    let selected = select(model, &files.files).ok()?;
    let paths = selected
        .iter()
        .map(|file| cache.cached_path(&files.commit, file));
    let paths: Option<Vec<_>> = paths.collect();
    paths?.into_iter().next()
}

/// Returns the end of an error message: the cached models of the repository, or nothing if there are none.
fn cached_hint(cache: &RepoCache, repo: &str) -> String {
    let mut names = BTreeSet::new();
    for commit in cache.commits() {
        let files = cache.cached_files(&commit).files;
        let models = models(repo, &files).into_iter();
        names.extend(models.map(|it| format!("{HUB_PREFIX}{}", it.name)));
    }
    match names.is_empty() {
        true => String::new(),
        false => {
            let names: Vec<_> = names.into_iter().collect();
            format!("; the cache has {}", names.join(", "))
        }
    }
}

impl FetchContext<'_> {
    /// Asks the Hub for the files of the repository.
    async fn list_files(&self) -> Result<RepoFiles, HubError> {
        let unreachable = |reason: String| HubError::Unreachable {
            model: self.model.to_string(),
            cache: self.options.cache.clone(),
            reason,
        };
        let repo = self.model.repo();
        let path = format!("/api/models/{repo}/revision/main?blobs=true");
        let response = self.client.get(&path, None).await;
        let response = response.map_err(|error| unreachable(error.to_string()))?;
        let status = response.status();
        if status.is_server_error() {
            let (endpoint, status) = (self.endpoint(), status.as_u16());
            return Err(unreachable(format!(
                "{endpoint} answers with the HTTP status {status}"
            )));
        }
        if status != StatusCode::OK {
            return Err(self.status_error(status, format!("repository {repo}")));
        }
        let invalid = |problem: String| HubError::InvalidResponse {
            model: self.model.to_string(),
            endpoint: self.endpoint(),
            problem,
        };
        let body = response.into_body().read_all(MAX_LIST_BYTES).await;
        let body = body.map_err(|error| match error {
            ClientError::TooLong { .. } => invalid(error.to_string()),
            ClientError::Connect { .. }
            | ClientError::Broken { .. }
            | ClientError::Redirect { .. } => unreachable(error.to_string()),
        })?;
        RepoFiles::parse(&body).map_err(invalid)
    }

    /// Downloads the files of the model one after the other.
    async fn download_all(
        &self,
        cache: &RepoCache,
        files: &RepoFiles,
    ) -> Result<PathBuf, HubError> {
        let selected = select(self.model, &files.files).map_err(|reason| HubError::Select {
            model: self.model.to_string(),
            reason,
        })?;
        let mut first = None;
        for (index, file) in selected.iter().enumerate() {
            // Other programs may fill the disk during the download, so the check is repeated.
            check_space(self, cache, &selected[index..])?;
            let path = download(self, cache, &files.commit, file).await?;
            first.get_or_insert(path);
        }
        let stored = cache.store_files(files);
        stored.map_err(|error| self.cache_error(error))?;
        Ok(first.expect("a model has at least one file"))
    }
}
