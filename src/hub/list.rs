//! The models in the cache, and the table of `tokenway models`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use indicatif::DecimalBytes;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::cache::{RepoCache, cached_repos};
use super::reference::{HUB_PREFIX, HubModel};
use super::select::models;

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedModel {
    /// The name that selects this file.
    pub name: HubModel,
    /// Quantization, such as `Q4_K_M`, if the name of the file ends with one.
    pub quantization: Option<String>,
    /// Number of files: more than 1 for a split model.
    pub files: usize,
    /// Size of all files in bytes.
    pub size: u64,
    /// Time at which the newest file was written.
    pub modified: SystemTime,
}

/// Returns the models in a cache folder, in the order of their names. If several commits have a model of the same name,
/// it is the one that the name selects.
///
/// # Errors
/// The folder cannot be read. A folder that does not exist has no models.
pub fn cached_models(cache: &Path) -> io::Result<Vec<CachedModel>> {
    let mut cached = Vec::new();
    for repo in cached_repos(cache)? {
        let of_repo = RepoCache::new(cache, &repo);
        let mut models = BTreeMap::new();
        for commit in of_repo.commits() {
            for model in models_of_commit(&of_repo, &repo, &commit) {
                models.entry(model.name.clone()).or_insert(model);
            }
        }
        cached.extend(models.into_values());
    }
    Ok(cached)
}

fn models_of_commit(cache: &RepoCache, repo: &str, commit: &str) -> Vec<CachedModel> {
    let files = cache.cached_files(commit).files;
    let models = models(repo, &files).into_iter().map(|model| {
        let paths = model
            .files
            .iter()
            .map(|file| cache.cached_path(commit, file));
        let modified = paths
            .flatten()
            .filter_map(|path| fs::metadata(path).ok()?.modified().ok());
        CachedModel {
            modified: modified.max().unwrap_or(SystemTime::UNIX_EPOCH),
            size: model.files.iter().map(|file| file.size).sum(),
            files: model.files.len(),
            quantization: model.quantization,
            name: model.name,
        }
    });
    models.collect()
}

/// Renders the models of a cache folder as a table with one line per model.
#[must_use]
pub fn render_models(cache: &Path, models: &[CachedModel]) -> String {
    if models.is_empty() {
        let cache = cache.display();
        return format!(
            "There are no models in {cache}; HF_HUB_CACHE and HF_HOME select another folder.\n\
             Download and serve one: tokenway serve --model hf:OWNER/REPO:QUANTIZATION\n\
             For example:            tokenway serve --model hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M\n"
        );
    }
    let header = ["MODEL", "QUANTIZATION", "SIZE", "FILES", "DATE"].map(str::to_owned);
    let rows: Vec<_> = [header].into_iter().chain(models.iter().map(row)).collect();
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or_default()
    };
    let widths = [0, 1, 2, 3].map(width);
    let line = |row: &[String; 5]| {
        let [model, quantization, size, files, date] = row;
        let [a, b, c, d] = widths;
        format!("{model:a$}  {quantization:b$}  {size:>c$}  {files:>d$}  {date}\n")
    };
    rows.iter().map(line).collect()
}

fn row(model: &CachedModel) -> [String; 5] {
    let date = Timestamp::try_from(model.modified).map(|time| {
        let local = time.to_zoned(TimeZone::system());
        local.date().to_string()
    });
    [
        format!("{HUB_PREFIX}{}", model.name),
        model.quantization.clone().unwrap_or_else(|| "-".to_owned()),
        DecimalBytes(model.size).to_string(),
        model.files.to_string(),
        date.unwrap_or_else(|_| "-".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_table_has_aligned_columns_and_names_that_can_be_typed() {
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(12 * 60 * 60);
        let models = [
            CachedModel {
                name: HubModel::file("a/b", "m-Q4_K_M.gguf"),
                quantization: Some("Q4_K_M".to_owned()),
                files: 1,
                size: 98_500_000,
                modified: noon,
            },
            CachedModel {
                name: HubModel::file("a/long-name", "m-00001-of-00012.gguf"),
                quantization: None,
                files: 12,
                size: 5,
                modified: noon,
            },
        ];
        let table = render_models(Path::new("/cache"), &models);
        let expected = "\
MODEL                                 QUANTIZATION      SIZE  FILES  DATE
hf:a/b:m-Q4_K_M.gguf                  Q4_K_M        98.50 MB      1  1970-01-01
hf:a/long-name:m-00001-of-00012.gguf  -                  5 B     12  1970-01-01
";
        assert_eq!(table, expected);
    }
}
