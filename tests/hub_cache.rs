//! The cache of models from the Hub: models without a network, models that other programs have downloaded, and the list
//! of models.

mod support;

use std::fs;
use std::path::Path;

use support::hub::{
    COMMIT, FILE, TestHub, contents, error_of, fetch_quietly, sha256, snapshot, unreachable,
};
use tokenway::hub::{cached_models, fetch};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Writes files into the cache as other programs do: without Tokenway's list of the repository's files.
fn cache_like_another_program(cache: &Path, files: &[&str]) {
    let refs = cache.join("models--org--repo/refs");
    fs::create_dir_all(&refs).expect("a folder");
    fs::write(refs.join("main"), COMMIT).expect("a file");
    for file in files {
        let path = snapshot(cache, file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, "x").expect("a file");
    }
}

#[tokio::test]
async fn a_cached_model_needs_neither_a_network_nor_permission_to_download() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    drop(hub);
    let mut options = unreachable(cache.path());
    assert_eq!(fetch_quietly("", &options).await.unwrap(), path);
    options.is_offline = true;
    assert_eq!(fetch_quietly("", &options).await.unwrap(), path);
}

#[tokio::test]
async fn a_model_that_is_not_cached_needs_a_network() {
    let cache = folder();
    let shown = cache.path().display().to_string();
    let mut options = unreachable(cache.path());
    let error = error_of(":Q8_0", &options).await;
    for expected in [
        "hf:org/repo:Q8_0 is not in the cache",
        &shown,
        "cannot connect to 127.0.0.1:1",
        "Connection refused",
        "check the network, HF_ENDPOINT and HTTPS_PROXY",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    options.is_offline = true;
    let error = error_of("", &options).await;
    assert!(
        error.contains("HF_HUB_OFFLINE forbids downloads"),
        "{error}"
    );
}

#[tokio::test]
async fn another_quantization_than_the_cached_one_is_never_chosen_without_a_network() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"x"), ("m-Q8_0.gguf", b"y")]).await;
    fetch_quietly(":Q8_0", &hub.options(cache.path()))
        .await
        .unwrap();
    drop(hub);
    for choice in ["", ":Q4_K_M"] {
        let error = error_of(choice, &unreachable(cache.path())).await;
        let hint = "the cache has hf:org/repo:m-Q8_0.gguf";
        assert!(
            error.contains("is not in the cache") && error.contains(hint),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_file_that_another_program_has_cached_is_used_without_a_network_if_it_is_named() {
    let cache = folder();
    cache_like_another_program(cache.path(), &[FILE, "m-Q8_0.gguf"]);
    let mut options = unreachable(cache.path());
    for is_offline in [false, true] {
        options.is_offline = is_offline;
        let expected = snapshot(cache.path(), FILE);
        for choice in [":q4_k_m", ":m-Q4_K_M.gguf"] {
            assert_eq!(fetch_quietly(choice, &options).await.unwrap(), expected);
        }
        let error = error_of("", &options).await;
        let hint = "the cache has hf:org/repo:m-Q4_K_M.gguf, hf:org/repo:m-Q8_0.gguf";
        assert!(error.contains(hint), "{error}");
    }
}

#[tokio::test]
async fn contents_that_are_cached_for_another_commit_are_not_downloaded_again() {
    let cache = folder();
    let blobs = cache.path().join("models--org--repo/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(sha256(&contents())), contents()).unwrap();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents());
    assert_eq!(hub.downloads(), []);
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_is_an_error_that_names_it() {
    let cache = folder();
    let file = cache.path().join("file");
    fs::write(&file, "").unwrap();
    let hub = TestHub::start(&[(FILE, b"x")]).await;
    let error = error_of("", &hub.options(&file)).await;
    assert!(
        error.contains("cannot be written") && error.contains("set HF_HUB_CACHE"),
        "{error}"
    );
}

#[tokio::test]
async fn cached_models_are_listed_with_their_size_and_the_name_that_selects_them() {
    let cache = folder();
    let parts = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"];
    let hub = TestHub::start(&[
        (FILE, &contents()),
        (parts[0], b"a"),
        (parts[1], b"bc"),
        ("mmproj.gguf", b"x"),
    ])
    .await;
    let options = hub.options(cache.path());
    assert_eq!(cached_models(cache.path()).unwrap(), []);
    assert_eq!(cached_models(&cache.path().join("nothing")).unwrap(), []);
    fetch_quietly("", &options).await.unwrap();
    fetch_quietly(":Q8_0", &options).await.unwrap();
    let models = cached_models(cache.path()).unwrap();
    let [q4, q8] = &models[..] else {
        panic!("{models:?}");
    };
    assert_eq!(
        (q4.name.to_string(), q4.files, q4.size),
        ("org/repo:m-Q4_K_M.gguf".to_owned(), 1, 100_000)
    );
    assert_eq!(
        (q8.name.to_string(), q8.files, q8.size),
        ("org/repo:m-Q8_0-00001-of-00002.gguf".to_owned(), 2, 3)
    );
    assert_eq!(q8.quantization.as_deref(), Some("Q8_0"));
    drop(hub);
    for model in models {
        fetch(&model.name, &unreachable(cache.path()), &|_| ())
            .await
            .expect("a cached model");
    }
}
