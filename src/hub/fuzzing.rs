//! Fuzz target of the responses of a Hub: the target of a redirect, and the list of a repository's files.

use http::Uri;

use super::reference::{HUB_PREFIX, HubModel};
use super::repo_files::RepoFiles;
use super::select::{models, select};
use super::url::{encode_path, has_same_origin, join};

const ENDPOINT: &str = "https://hub.example/mirror";

/// The input is a line with the target of a redirect, then a list of files.
///
/// Checks that each address that counts as the Hub's, and therefore gets the token, has the Hub's scheme and host.
/// Checks that the name of each listed model selects that model, and that the paths of its files stay in the cache.
pub(crate) fn hub_responses(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n');
    let (location, list) = data.split_at(end.unwrap_or(data.len()));
    if let Ok(location) = std::str::from_utf8(location) {
        check_redirect(location);
    }
    if let Ok(files) = RepoFiles::parse(list) {
        check_files(&files);
    }
}

fn check_redirect(location: &str) {
    let Some(target) = join(ENDPOINT, location) else {
        return;
    };
    assert!(
        ["http://", "https://"]
            .iter()
            .any(|scheme| target.starts_with(scheme)),
        "{target}"
    );
    let Ok(uri) = target.parse::<Uri>() else {
        return;
    };
    if has_same_origin(&target, ENDPOINT) {
        assert_eq!(
            uri.host().map(str::to_ascii_lowercase).as_deref(),
            Some("hub.example")
        );
        assert_eq!(uri.scheme_str(), Some("https"));
    }
}

fn check_files(files: &RepoFiles) {
    for file in &files.files {
        let address = format!("{ENDPOINT}/{}", encode_path(&file.path));
        assert!(address.parse::<Uri>().is_ok(), "{address}");
        assert!(!file.path.starts_with('/') && !file.path.split('/').any(|it| it == ".."));
        let hashes = file.sha256.iter();
        assert!(
            hashes
                .into_iter()
                .all(|it| it.len() == 64 && !it.contains(['/', '.']))
        );
    }
    for model in models("a/b", &files.files) {
        let name = format!("{HUB_PREFIX}{}", model.name);
        assert_eq!(name.parse::<HubModel>().as_ref(), Ok(&model.name));
        assert!(model.quantization.is_none_or(|it| !it.is_empty()));
        let selected = select(&model.name, &files.files);
        assert_eq!(selected.as_deref(), Ok(&model.files[..]));
    }
}
