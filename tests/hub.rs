//! Downloads of models from a small local Hub: broken and damaged downloads, redirects, tokens and errors.

mod support;

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use axum::http::StatusCode;
use serde_json::json;
use support::hub::{
    COMMIT, FILE, Fault, TestHub, contents, error_of, fetch_quietly, incomplete, sha256, snapshot,
};
use tokenway::hub::{DownloadProgress, HubModel, HubToken, fetch};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[tokio::test]
async fn a_model_is_downloaded_once_in_the_layout_of_the_hubs_cache() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents()), ("README.md", b"x")]).await;
    let options = hub.options(cache.path());
    let path = fetch_quietly("", &options).await.expect("a download");
    assert_eq!(path, snapshot(cache.path(), FILE));
    assert_eq!(fs::read(&path).unwrap(), contents());
    let repo = cache.path().join("models--org--repo");
    let target = format!("../../blobs/{}", sha256(&contents()));
    assert_eq!(fs::read_link(&path).unwrap(), Path::new(&target));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    assert!(!incomplete(cache.path(), &contents()).exists());
    let requests = hub.requests().len();
    for choice in ["", ":q4_k_m", ":m-Q4_K_M.gguf"] {
        assert_eq!(fetch_quietly(choice, &options).await.unwrap(), path);
    }
    assert_eq!(hub.requests().len(), requests, "the cache needs no request");
    assert_eq!(hub.downloads(), [None]);
}

#[tokio::test]
async fn progress_ends_with_the_whole_file() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let seen = Mutex::new(Vec::new());
    let record = |it: DownloadProgress<'_>| {
        assert_eq!((it.file, it.size), (FILE, 100_000));
        seen.lock().unwrap().push(it.received);
    };
    fetch(
        &"hf:org/repo".parse().unwrap(),
        &hub.options(cache.path()),
        &record,
    )
    .await
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!((seen.first(), seen.last()), (Some(&0), Some(&100_000)));
    assert!(seen.is_sorted(), "{seen:?}");
}

#[tokio::test]
async fn a_broken_download_continues_where_it_broke() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    hub.inject(&[
        Fault::CutAfter(40_000),
        Fault::Status(StatusCode::BAD_GATEWAY),
        Fault::CutAfter(1),
    ]);
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents());
    let range = |from: u32| Some(format!("bytes={from}-"));
    assert_eq!(
        hub.downloads(),
        [None, range(40_000), range(40_000), range(40_001)]
    );
}

#[tokio::test]
async fn a_download_that_makes_no_progress_fails_and_is_continued_by_the_next_start() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let mut faults = vec![Fault::CutAfter(70_000)];
    faults.extend([Fault::CutAfter(0); 4]);
    hub.inject(&faults);
    let error = error_of("", &hub.options(cache.path())).await;
    let expected = "the download of m-Q4_K_M.gguf stopped at 70.00 kB of 100.00 kB";
    assert!(error.contains(expected), "{error}");
    assert!(error.contains("start again to continue"), "{error}");
    assert!(!snapshot(cache.path(), FILE).exists());
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents());
    assert_eq!(
        hub.downloads().last().unwrap().as_deref(),
        Some("bytes=70000-")
    );
}

#[tokio::test]
async fn a_server_that_ignores_ranges_sends_the_file_from_its_start() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    hub.inject(&[Fault::CutAfter(10), Fault::IgnoreRange]);
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents());
}

#[tokio::test]
async fn a_download_that_always_breaks_before_its_longest_part_fails() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let mut faults = vec![Fault::CutAfter(50_000)];
    faults.extend(
        [40_000, 50_000]
            .map(Fault::IgnoreRangeAndCutAfter)
            .repeat(4),
    );
    hub.inject(&faults);
    let error = error_of("", &hub.options(cache.path())).await;
    assert!(error.contains("stopped at 50.00 kB"), "{error}");
    assert_eq!(hub.downloads().len(), 5);
}

#[tokio::test]
async fn a_download_that_is_redirected_to_another_scheme_is_not_tried_again() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    hub.inject(&[Fault::Redirect("ftp://storage.example/m.gguf"); 2]);
    let error = error_of("", &hub.options(cache.path())).await;
    let expected = "redirects to an address that is not http or https; check HF_ENDPOINT";
    assert!(error.contains(expected), "{error}");
    assert_eq!(hub.downloads().len(), 1);
}

#[tokio::test]
async fn a_damaged_download_is_rejected_and_deleted() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    hub.inject(&[Fault::WrongByte]);
    let error = error_of("", &hub.options(cache.path())).await;
    let expected = format!("its SHA-256 must be {}", sha256(&contents()));
    assert!(error.contains(&expected), "{error}");
    assert!(!incomplete(cache.path(), &contents()).exists());
    assert!(!snapshot(cache.path(), FILE).exists());
    fetch_quietly("", &hub.options(cache.path()))
        .await
        .expect("a whole download");
}

#[tokio::test]
async fn a_file_of_another_size_is_rejected() {
    for (faults, expected) in [
        (
            &[Fault::Longer][..],
            "must have 100000 bytes, but the server sends 100001",
        ),
        (
            &[Fault::CutAfter(5), Fault::Longer],
            "the range 'bytes 5-100000/100001'",
        ),
        (
            &[Fault::CutAfter(5), Fault::WrongRange],
            "the range 'bytes 6-99999/100000'",
        ),
    ] {
        let cache = folder();
        let hub = TestHub::start(&[(FILE, &contents())]).await;
        hub.inject(faults);
        let error = error_of("", &hub.options(cache.path())).await;
        assert!(error.contains(expected), "{error}");
        assert!(!snapshot(cache.path(), FILE).exists());
    }
}

#[tokio::test]
async fn a_page_in_place_of_the_rest_of_a_file_does_not_destroy_the_bytes_so_far() {
    for has_length in [true, false] {
        let cache = folder();
        let hub = TestHub::start(&[(FILE, &contents())]).await;
        hub.inject(&[Fault::CutAfter(70_000), Fault::Page { has_length }]);
        let error = error_of("", &hub.options(cache.path())).await;
        assert!(error.contains("must have 100000 bytes"), "{error}");
        let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
        assert_eq!(fs::read(path).unwrap(), contents());
        assert_eq!(
            hub.downloads().last().unwrap().as_deref(),
            Some("bytes=70000-")
        );
    }
}

#[tokio::test]
async fn an_unfinished_file_that_is_too_long_is_downloaded_again() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let unfinished = incomplete(cache.path(), &contents());
    fs::create_dir_all(unfinished.parent().unwrap()).unwrap();
    fs::write(unfinished, vec![0; 100_001]).unwrap();
    let path = fetch_quietly("", &hub.options(cache.path())).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), contents());
    assert_eq!(hub.downloads(), [None]);
}

#[tokio::test]
async fn the_token_is_sent_to_the_hub_and_not_to_the_server_that_it_redirects_to() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    hub.require_token("hf_secret", StatusCode::UNAUTHORIZED);
    let mut options = hub.options(cache.path());
    options.token = HubToken::parse("hf_secret").unwrap();
    // The Hub redirects the repository's old name to its new name on the same host.
    let renamed: HubModel = "hf:org/renamed".parse().unwrap();
    let error = fetch(&renamed, &options, &|_| ()).await.unwrap_err();
    assert!(error.to_string().contains("has no file"), "{error}");
    fetch_quietly("", &options).await.expect("a download");
    let requests = hub.requests();
    let (storage, hub): (Vec<_>, Vec<_>) = requests.iter().partition(|it| it.is_storage);
    assert!(
        hub.iter()
            .all(|it| it.authorization.as_deref() == Some("Bearer hf_secret")),
        "{hub:?}"
    );
    assert_eq!(storage.len(), 1);
    assert_eq!(storage[0].authorization, None);
}

#[tokio::test]
async fn a_denied_or_missing_repository_is_an_error_that_says_what_to_do() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let mut options = hub.options(cache.path());
    let missing: HubModel = "hf:org/nothing".parse().unwrap();
    let error = fetch(&missing, &options, &|_| ())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("has no repository org/nothing; check the name"),
        "{error}"
    );
    hub.require_token("hf_right", StatusCode::UNAUTHORIZED);
    let error = error_of("", &options).await;
    assert!(error.contains("denies access (401)"), "{error}");
    assert!(
        error.contains("set HF_TOKEN") && error.contains("(no token was sent)"),
        "{error}"
    );
    hub.require_token("hf_right", StatusCode::FORBIDDEN);
    options.token = HubToken::parse("hf_wrong").unwrap();
    let error = error_of("", &options).await;
    let access = format!("ask for access at {}/org/repo", hub.endpoint);
    assert!(
        error.contains("(403)") && error.contains(&access),
        "{error}"
    );
    assert!(!error.contains("hf_wrong"), "{error}");
}

#[tokio::test]
async fn a_choice_that_is_ambiguous_or_missing_downloads_nothing() {
    let cache = folder();
    let files = ["x-Q4_0.gguf", "y-Q4_0.gguf", "y-Q6_K.gguf"];
    let hub = TestHub::start(&files.map(|file| (file, &b"x"[..]))).await;
    let options = hub.options(cache.path());
    for (choice, expected) in [
        (
            ":Q4_0",
            "Q4_0 matches several models; name one of the files: hf:org/repo:x-Q4_0.gguf (Q4_0)",
        ),
        (
            ":Q8_0",
            "the repository has no model with the quantization Q8_0; it has hf:org/repo:x-Q4_0.gguf",
        ),
        (":z.gguf", "the repository has no file z.gguf"),
        (
            "",
            "the repository has several models; name a quantization or a file",
        ),
    ] {
        let error = error_of(choice, &options).await;
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(hub.downloads(), []);
    fetch_quietly(":q6_k", &options)
        .await
        .expect("the only model of this quantization");
}

#[tokio::test]
async fn all_parts_of_a_split_model_are_downloaded_and_the_first_one_is_returned() {
    let cache = folder();
    let parts = ["Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"];
    let hub = TestHub::start(&[(parts[0], b"first"), (parts[1], b"second")]).await;
    let options = hub.options(cache.path());
    let path = fetch_quietly(":Q8_0", &options).await.unwrap();
    assert_eq!(path, snapshot(cache.path(), parts[0]));
    assert_eq!(
        fs::read(snapshot(cache.path(), parts[1])).unwrap(),
        b"second"
    );
    // If one file is missing from the cache, that file is downloaded again.
    let second = fs::canonicalize(snapshot(cache.path(), parts[1])).unwrap();
    fs::remove_file(second).unwrap();
    fetch_quietly(":Q8_0", &options).await.unwrap();
    assert_eq!(hub.downloads().len(), 3);
}

#[tokio::test]
async fn two_downloads_of_the_same_file_at_the_same_time_are_one() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, &contents())]).await;
    let options = hub.options(cache.path());
    let (first, second) = tokio::join!(fetch_quietly("", &options), fetch_quietly("", &options));
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(hub.downloads(), [None]);
}

#[tokio::test]
async fn a_file_that_does_not_fit_on_the_disk_is_not_downloaded() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"x")]).await;
    hub.change_list(|list| list["siblings"][0]["lfs"]["size"] = json!(1_u64 << 60));
    let error = error_of("", &hub.options(cache.path())).await;
    assert!(
        error.contains("the download needs 1.15 EB of free space"),
        "{error}"
    );
    assert!(
        error.contains("free some space, or set HF_HUB_CACHE"),
        "{error}"
    );
    assert_eq!(hub.downloads(), []);
}

#[tokio::test]
async fn no_part_of_a_split_model_is_downloaded_if_only_some_parts_fit_on_the_disk() {
    let cache = folder();
    let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    let hub = TestHub::start(&[(parts[0], b"first"), (parts[1], b"second")]).await;
    let options = hub.options(cache.path());
    hub.change_list(|list| list["siblings"][1]["lfs"]["size"] = json!(1_u64 << 60));
    let error = error_of("", &options).await;
    assert!(
        error.contains("the download needs 1.15 EB of free space"),
        "{error}"
    );
    hub.change_list(|list| {
        let disk = rustix::fs::statvfs(std::env::temp_dir()).expect("a folder");
        let size = disk.f_bavail * disk.f_frsize / 5 * 3;
        for part in [0, 1] {
            list["siblings"][part]["lfs"]["size"] = json!(size);
        }
    });
    let error = error_of("", &options).await;
    assert!(error.contains("the download needs"), "{error}");
    assert_eq!(hub.downloads(), []);
}

#[tokio::test]
async fn a_file_without_a_hash_and_a_response_that_is_no_list_are_rejected() {
    let cache = folder();
    let hub = TestHub::start(&[(FILE, b"x")]).await;
    hub.change_list(|list| list["siblings"][0]["lfs"] = json!(null));
    let error = error_of("", &hub.options(cache.path())).await;
    assert!(
        error.contains("the Hub has no SHA-256 of m-Q4_K_M.gguf"),
        "{error}"
    );
    hub.change_list(|list| *list = json!({"error": "x"}));
    let error = error_of("", &hub.options(cache.path())).await;
    assert!(
        error.contains("is not valid: missing field `sha`") && error.contains("check HF_ENDPOINT"),
        "{error}"
    );
    assert_eq!(hub.downloads(), []);
}
