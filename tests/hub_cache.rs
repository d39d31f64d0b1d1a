//! The cache of models from the Hub: models without a network, models that other programs have downloaded, and the list
//! of models.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use support::hub::{
    COMMIT, FILE, SECOND_COMMIT, TestHub, contents, error_of, fetch_quietly, sha256, snapshot,
    snapshot_of, unreachable,
};
use tokenway::hub::{cached_models, fetch};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

const OTHER_FILE: &str = "m-Q8_0.gguf";

/// Writes files of a commit into the cache as other programs do: without Tokenway's list of the commit's files.
fn cache_like_another_program(cache: &Path, commit: &str, files: &[&str]) {
    set_main(cache, commit);
    for file in files {
        let path = snapshot_of(commit, cache, file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, "x").expect("a file");
    }
}

/// Makes this commit the one of `refs/main`.
fn set_main(cache: &Path, commit: &str) {
    let refs = cache.join("models--org--repo/refs");
    fs::create_dir_all(&refs).expect("a folder");
    fs::write(refs.join("main"), commit).expect("a file");
}

fn make_pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a named pipe");
}

/// Returns the names in a folder of `org/repo`, in alphabetical order.
fn names_in(cache: &Path, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(cache.join("models--org--repo").join(folder)).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string());
    let mut names: Vec<_> = names.map(|name| name.expect("a name in UTF-8")).collect();
    names.sort();
    names
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
async fn offline_a_cached_quantization_never_replaces_the_requested_one() {
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
    cache_like_another_program(cache.path(), COMMIT, &[FILE, OTHER_FILE]);
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
async fn a_cached_model_is_used_after_another_one_was_downloaded_from_a_newer_commit() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"first")]).await;
    let options = hub.options(cache.path());
    let first = fetch_quietly("", &options).await.unwrap();
    hub.commit(&[(FILE, b"changed"), (OTHER_FILE, b"other")]);
    let other = fetch_quietly(":Q8_0", &options).await.unwrap();
    assert_eq!(other, snapshot_of(SECOND_COMMIT, cache.path(), OTHER_FILE));
    let requests = hub.requests().len();
    let mut offline = unreachable(cache.path());
    offline.is_offline = true;
    for options in [&options, &unreachable(cache.path()), &offline] {
        for (choice, expected) in [
            ("", &first),
            (":Q4_K_M", &first),
            (":m-Q4_K_M.gguf", &first),
            (":Q8_0", &other),
        ] {
            let path = fetch_quietly(choice, options).await.unwrap();
            assert_eq!(&path, expected, "{choice}");
        }
    }
    assert_eq!(fs::read(first).unwrap(), b"first");
    assert_eq!(hub.requests().len(), requests, "the cache needs no request");
    let error = error_of(":F16", &offline).await;
    let hint = "; the cache has hf:org/repo:m-Q4_K_M.gguf, hf:org/repo:m-Q8_0.gguf";
    assert!(error.ends_with(hint), "{error}");
}

#[tokio::test]
async fn a_file_that_another_program_has_cached_at_another_commit_is_used_as_it_is() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"first"), (OTHER_FILE, b"changed")]).await;
    let options = hub.options(cache.path());
    let first = fetch_quietly("", &options).await.unwrap();
    cache_like_another_program(cache.path(), SECOND_COMMIT, &[OTHER_FILE]);
    let requests = hub.requests().len();
    for main in [SECOND_COMMIT, COMMIT] {
        set_main(cache.path(), main);
        for options in [&options, &unreachable(cache.path())] {
            let other = fetch_quietly(":Q8_0", options).await.unwrap();
            assert_eq!(other, snapshot_of(SECOND_COMMIT, cache.path(), OTHER_FILE));
            assert_eq!(fetch_quietly("", options).await.unwrap(), first);
        }
    }
    assert_eq!(hub.requests().len(), requests);
}

#[tokio::test]
async fn the_commit_of_main_is_searched_first_then_the_one_that_changed_last() {
    let cache = folder();
    for (age, commit) in [(3, COMMIT), (1, "a"), (2, SECOND_COMMIT)] {
        cache_like_another_program(cache.path(), commit, &[FILE]);
        let snapshot = File::open(snapshot_of(commit, cache.path(), "")).unwrap();
        let modified = SystemTime::now() - Duration::from_secs(age);
        snapshot.set_modified(modified).unwrap();
    }
    for (main, expected) in [
        (COMMIT, COMMIT),
        (SECOND_COMMIT, SECOND_COMMIT),
        ("a", "a"),
        ("not cached", "a"),
    ] {
        set_main(cache.path(), main);
        let path = fetch_quietly(":Q4_K_M", &unreachable(cache.path()))
            .await
            .unwrap();
        assert_eq!(path, snapshot_of(expected, cache.path(), FILE), "{main}");
    }
}

#[tokio::test]
async fn only_files_of_the_repository_lie_in_the_folders_that_other_programs_read() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"first")]).await;
    let options = hub.options(cache.path());
    fetch_quietly("", &options).await.unwrap();
    hub.commit(&[(FILE, b"first"), (OTHER_FILE, b"other")]);
    fetch_quietly(":Q8_0", &options).await.unwrap();
    let names = |folder: &str| names_in(cache.path(), folder);
    assert_eq!(names("refs"), ["main"]);
    assert_eq!(names("snapshots"), [SECOND_COMMIT, COMMIT]);
    assert_eq!(names(&format!("snapshots/{COMMIT}")), [FILE]);
    assert_eq!(names(&format!("snapshots/{SECOND_COMMIT}")), [OTHER_FILE]);
    let mut hashes = [sha256(b"first"), sha256(b"other")];
    hashes.sort();
    assert_eq!(names("blobs"), hashes);
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
async fn a_link_or_a_pipe_in_place_of_a_partial_file_or_a_lock_is_an_error_and_keeps_its_target() {
    for name in ["blobs/SHA256.incomplete", ".locks/SHA256.lock"] {
        for is_link in [true, false] {
            let cache = folder();
            let target = cache.path().join("precious");
            fs::write(&target, "precious").unwrap();
            let name = name.replace("SHA256", &sha256(b"x"));
            let path = match name.strip_prefix(".locks/") {
                Some(lock) => cache.path().join(".locks/models--org--repo").join(lock),
                None => cache.path().join("models--org--repo").join(&name),
            };
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match is_link {
                true => symlink(&target, &path).unwrap(),
                false => make_pipe(&path),
            }
            let hub = TestHub::start(&[(FILE, b"x")]).await;
            let error = error_of("", &hub.options(cache.path())).await;
            assert!(error.contains("cannot be written"), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
            assert_eq!(fs::read(&target).unwrap(), b"precious");
            assert_eq!(hub.downloads(), []);
        }
    }
}

#[tokio::test]
async fn a_pipe_in_place_of_the_main_ref_or_a_list_does_not_block() {
    let cache = folder();
    cache_like_another_program(cache.path(), COMMIT, &[FILE]);
    let repo = cache.path().join("models--org--repo");
    fs::remove_file(repo.join("refs/main")).unwrap();
    fs::create_dir_all(repo.join("tokenway-files")).unwrap();
    for path in [
        "refs/main".to_owned(),
        format!("tokenway-files/{COMMIT}.json"),
    ] {
        make_pipe(&repo.join(path));
    }
    let mut options = unreachable(cache.path());
    options.is_offline = true;
    let expected = snapshot(cache.path(), FILE);
    assert_eq!(fetch_quietly(":Q4_K_M", &options).await.unwrap(), expected);
    assert_eq!(cached_models(cache.path()).unwrap().len(), 1);
}

#[tokio::test]
async fn a_link_in_place_of_the_main_ref_is_replaced_and_its_target_is_kept() {
    let cache = folder();
    let target = cache.path().join("precious");
    fs::write(&target, "precious").unwrap();
    let main = cache.path().join("models--org--repo/refs/main");
    fs::create_dir_all(main.parent().unwrap()).unwrap();
    symlink(&target, &main).unwrap();
    let hub = TestHub::start(&[(FILE, b"x")]).await;
    fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    assert_eq!(fs::read_to_string(&main).unwrap(), COMMIT);
}

#[tokio::test]
async fn a_list_that_leads_out_of_the_repository_is_ignored() {
    let hub = TestHub::start(&[(FILE, b"x")]).await;
    let cache = folder();
    let repo = cache.path().join("cache/models--org--repo");
    for folder in ["tokenway-files", &format!("snapshots/{COMMIT}")] {
        fs::create_dir_all(repo.join(folder)).unwrap();
    }
    fs::create_dir_all(cache.path().join("outside")).unwrap();
    fs::write(cache.path().join("outside/m-Q4_K_M.gguf"), "x").unwrap();
    let path = "../../../../outside/m-Q4_K_M.gguf";
    let list =
        json!({"commit": COMMIT, "files": [{"path": path, "size": 1, "sha256": sha256(b"x")}]});
    let lists = repo.join("tokenway-files");
    fs::write(lists.join(format!("{COMMIT}.json")), list.to_string()).unwrap();
    let of_cache = cache.path().join("cache");
    let path = fetch_quietly(":Q4_K_M", &hub.options(&of_cache)).await;
    assert_eq!(path.unwrap(), snapshot(&of_cache, FILE));
}

#[tokio::test]
async fn links_between_folders_and_names_that_no_model_has_are_not_listed() {
    let cache = folder();
    cache_like_another_program(cache.path(), COMMIT, &[FILE, "bell\u{7}.gguf"]);
    let commit = cache
        .path()
        .join("models--org--repo/snapshots")
        .join(COMMIT);
    symlink(&commit, commit.join("loop")).unwrap();
    fs::create_dir_all(cache.path().join("models--o\u{1b}[31m--r/snapshots/a")).unwrap();
    fs::write(
        cache
            .path()
            .join("models--o\u{1b}[31m--r/snapshots/a/m.gguf"),
        "x",
    )
    .unwrap();
    let models = cached_models(cache.path()).unwrap().into_iter();
    let names: Vec<_> = models.map(|it| it.name.to_string()).collect();
    assert_eq!(names, [format!("org/repo:{FILE}")]);
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

#[tokio::test]
async fn the_models_of_all_commits_are_listed_each_name_once() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"first")]).await;
    let options = hub.options(cache.path());
    fetch_quietly("", &options).await.unwrap();
    hub.commit(&[(OTHER_FILE, b"other")]);
    fetch_quietly(":Q8_0", &options).await.unwrap();
    cache_like_another_program(cache.path(), "a", &[FILE, "m-F16.gguf"]);
    let listed = |main| {
        set_main(cache.path(), main);
        let models = cached_models(cache.path()).unwrap().into_iter();
        let models = models.map(|it| (it.name.to_string(), it.size));
        models.collect::<Vec<_>>()
    };
    for (main, size) in [(COMMIT, 5), ("a", 1)] {
        let expected = [("m-F16.gguf", 1), (FILE, size), (OTHER_FILE, 5)];
        let expected = expected.map(|(file, size)| (format!("org/repo:{file}"), size));
        assert_eq!(listed(main), expected);
    }
}
