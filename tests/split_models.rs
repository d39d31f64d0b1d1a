//! Models that are split into several GGUF files.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value as Json, json};
use support::gguf::{Gguf, Value};
use support::http::{completion, get};
use support::{Setup, program};
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

/// Number of tensors in the first file of a split model.
const FIRST_TENSORS: usize = 4;

/// Writes both files of a model. Returns the path of the first file.
fn write_parts(folder: &Path, [first, second]: &[Gguf; 2]) -> PathBuf {
    let path = |number| folder.join(format!("tiny-Q8_0-0000{number}-of-00002.gguf"));
    fs::write(path(1), first.bytes()).expect("a file");
    fs::write(path(2), second.bytes()).expect("a file");
    path(1)
}

async fn completion_of(model_path: PathBuf) -> Json {
    let options = LlamaOptions {
        model_path,
        threads: 1,
        context_length: None,
        ..LlamaOptions::default()
    };
    let loader = Arc::new(LlamaLoader::new(options));
    let server = Setup::runner("tiny", loader, 2).start().await;
    let body = json!({"prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let (_, body) = completion(&body).fetch(&server).await;
    body.json()["choices"].clone()
}

/// Runs a server with a model file that it must reject. Returns the exit code and the error.
async fn serve_error(path: &Path) -> (Option<i32>, String) {
    let free = "127.0.0.1:0";
    let server = program::tokenway().args([
        "--http-listen",
        free,
        "--grpc-listen",
        free,
        "--drain-grace",
        "0",
    ]);
    let outcome = server.arg("--model").arg(path).run().await;
    assert!(
        outcome.code.is_some(),
        "the process was killed: {outcome:?}"
    );
    (outcome.code, outcome.stderr)
}

#[tokio::test]
async fn a_split_model_makes_the_same_tokens_as_the_whole_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let whole = folder.path().join("tiny.gguf");
    fs::write(&whole, Gguf::tiny().bytes()).expect("a file");
    let expected = completion_of(whole).await;
    assert!(expected[0]["text"].is_string(), "{expected}");
    for first in [0, FIRST_TENSORS] {
        let path = write_parts(folder.path(), &Gguf::tiny().split(first));
        assert_eq!(completion_of(path).await, expected);
    }
}

#[tokio::test]
async fn the_name_of_a_split_model_has_no_part_number() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = write_parts(folder.path(), &Gguf::tiny().split(FIRST_TENSORS));
    let path = path.to_str().expect("a path in UTF-8");
    let (_server, [http, _]) = program::start_server(&["--model", path]).await;
    let address = http.strip_prefix("http://").expect("a URL");
    let mut response = get("/v1/models").send_to(address).await;
    let models = response.read_rest().await.json();
    assert_eq!(models["data"][0]["id"], "tiny-Q8_0");
}

#[tokio::test]
async fn a_missing_file_or_another_than_the_first_is_rejected_before_anything_listens() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let first = write_parts(folder.path(), &Gguf::tiny().split(FIRST_TENSORS));
    let second = folder.path().join("tiny-Q8_0-00002-of-00002.gguf");
    let (code, error) = serve_error(&second).await;
    let expected = "this is file 2 of 2 of a split model; set the model path to the first file, tiny-Q8_0-00001-of-00002.gguf";
    assert!(code == Some(2) && error.contains(expected), "{error}");
    fs::write(&second, "not a model").expect("a file");
    let (code, error) = serve_error(&first).await;
    let expected = "in tiny-Q8_0-00002-of-00002.gguf, another file of this split model: this is not a GGUF model file";
    assert!(code == Some(2) && error.contains(expected), "{error}");
    fs::remove_file(&second).expect("the file exists");
    let (code, error) = serve_error(&first).await;
    assert!(
        code == Some(2) && error.contains("the model file cannot be read"),
        "{error}"
    );
}

/// Returns the two files of a split model, with this value in one of them.
fn parts_with(index: usize, key: &str, value: Value) -> [Gguf; 2] {
    let mut parts = Gguf::tiny().split(FIRST_TENSORS);
    parts[index] = parts[index].clone().with(key, value);
    parts
}

/// Returns the two files of a split model, without this key in one of them.
fn parts_without(index: usize, key: &str) -> [Gguf; 2] {
    let mut parts = Gguf::tiny().split(FIRST_TENSORS);
    parts[index] = parts[index].clone().without(key);
    parts
}

async fn assert_rejected(parts: &[Gguf; 2], expected: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (code, error) = serve_error(&write_parts(folder.path(), parts)).await;
    assert!(
        code == Some(1) && error.contains(expected),
        "{expected}: {code:?} {error}"
    );
}

#[tokio::test]
async fn files_that_do_not_belong_together_are_rejected() {
    let [first, second] = Gguf::tiny().split(FIRST_TENSORS);
    let mut same_tensor = second.clone();
    same_tensor.tensors[0].name = first.tensors[0].name.clone();
    let mut no_tensors = [first.clone(), second];
    no_tensors.iter_mut().for_each(|part| part.tensors.clear());
    for (parts, expected) in [
        (
            parts_with(0, "split.count", Value::U16(3)),
            "`split.count` is 3, but the file's name stands for a model of 2",
        ),
        (
            parts_without(0, "split.count"),
            "`split.count` is 1, but the file's name stands for a model of 2",
        ),
        (
            parts_with(1, "split.count", Value::U16(9)),
            "another file of this split model: `split.count` is 9",
        ),
        (
            parts_with(0, "split.no", Value::U16(1)),
            "`split.no` must be 0 for this name (got 1)",
        ),
        (
            parts_with(1, "split.no", Value::U16(0)),
            "`split.no` must be 1 for this name (got 0)",
        ),
        (
            parts_without(1, "split.no"),
            "`split.no` must be 1 for this name (got 0)",
        ),
        (
            parts_with(1, "split.no", Value::U32(1)),
            "`split.no` must be an unsigned integer of 16 bits",
        ),
        (
            parts_with(0, "split.count", Value::Text("2".to_owned())),
            "`split.count` must be an unsigned integer",
        ),
        (
            [first, same_tensor],
            "tensor `token_embd.weight` is in the model twice",
        ),
        (no_tensors, "the model has no tensors"),
    ] {
        assert_rejected(&parts, expected).await;
    }
}

#[tokio::test]
async fn files_that_llama_cpp_rejects_are_an_error_and_do_not_abort_the_process() {
    let [first, second] = Gguf::tiny().split(FIRST_TENSORS);
    for (parts, expected) in [
        (
            parts_with(0, "split.tensors.count", Value::I32(5)),
            "could not load this model file",
        ),
        (
            parts_without(0, "split.tensors.count"),
            "could not load this model file",
        ),
        (
            [first, second.with("general.alignment", Value::U32(7))],
            "general.alignment",
        ),
    ] {
        assert_rejected(&parts, expected).await;
    }
}

#[tokio::test]
async fn a_renamed_file_of_a_split_model_is_rejected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [first, _] = Gguf::tiny().split(FIRST_TENSORS);
    let path = folder.path().join("model.gguf");
    fs::write(&path, first.bytes()).expect("a file");
    let (code, error) = serve_error(&path).await;
    let expected = "give each file its original name, such as model-00001-of-00002.gguf";
    assert!(code == Some(1) && error.contains(expected), "{error}");
}
