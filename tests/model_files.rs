//! Damaged model files: the operator gets an error that describes the damage, and the process never aborts.
//! llama.cpp's own checks would abort the process.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::json;
use support::gguf::{Gguf, Value};
use support::http::{completion, post};
use support::{Setup, program};
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

/// Environment variable that passes the folder of model files to the test process that loads them.
const FOLDER_VARIABLE: &str = "TOKENWAY_TEST_MODEL_FILES";

fn setup(model_path: PathBuf) -> Setup {
    let options = LlamaOptions {
        model_path,
        threads: 1,
        context_length: None,
        ..LlamaOptions::default()
    };
    Setup::runner("tiny", Arc::new(LlamaLoader::new(options)), 2)
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("the file can be written");
    path
}

/// Returns the error with which `tokenway serve` rejects this model.
async fn load_error(model: &Gguf) -> String {
    load_error_of(&model.bytes()).await
}

async fn load_error_of(bytes: &[u8]) -> String {
    serve_error(bytes, [], 1).await
}

/// Returns the error with which `tokenway serve` ends with these arguments. Checks the exit code.
async fn serve_error<const N: usize>(bytes: &[u8], arguments: [&str; N], code: i32) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = write_file(folder.path(), "model.gguf", bytes);
    let outcome = program::tokenway()
        .args([
            "serve",
            "--http-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
        ])
        .args(arguments)
        .arg("--model-path")
        .arg(path)
        .run()
        .await;
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    outcome.stderr
}

#[tokio::test]
async fn contradicting_device_settings_are_rejected_before_the_server_starts() {
    for (arguments, problem) in [
        (
            ["--cache-type-v", "q8_0", "--flash-attention", "off"],
            "--cache-type-v q8_0 needs flash attention, but --flash-attention is off",
        ),
        (
            ["--devices", "CUDA0,", "--gpu-layers", "1"],
            "--devices has an empty name",
        ),
        #[cfg(not(any(
            feature = "cuda",
            feature = "metal",
            feature = "rocm",
            feature = "vulkan"
        )))]
        (
            ["--devices", "CUDA0", "--threads", "1"],
            "--devices needs a build with GPU support; build Tokenway with the feature cuda",
        ),
        #[cfg(not(any(
            feature = "cuda",
            feature = "metal",
            feature = "rocm",
            feature = "vulkan"
        )))]
        (
            ["--gpu-layers", "1", "--threads", "1"],
            "--gpu-layers needs a build with GPU support",
        ),
    ] {
        let error = serve_error(&Gguf::tiny().bytes(), arguments, 2).await;
        assert!(error.contains(problem), "{error}");
    }
}

#[tokio::test]
async fn a_tiny_model_completes_text_and_renders_chats() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_file(folder.path(), "tiny.gguf", &Gguf::tiny().bytes());
    let server = setup(path).start().await;
    let body = json!({"prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let (_, body) = completion(&body).fetch(&server).await;
    assert_eq!(body.json()["usage"]["completion_tokens"], 4);
    let chat = json!({"messages": [{"role": "user", "content": "é!"}]});
    let (_, body) = post("/tokenize", chat.to_string()).fetch(&server).await;
    assert_eq!(body.json()["tokens"], json!([0xc3, 0xa9, 0x21]));
}

#[tokio::test]
async fn a_template_exception_is_a_400_with_its_message() {
    let template = "{{ raise_exception('Roles must alternate, not ' ~ messages[0].role) }}";
    let model = Gguf::tiny().with("tokenizer.chat_template", Value::Text(template.to_owned()));
    let folder = tempfile::tempdir().unwrap();
    let server = setup(write_file(folder.path(), "tiny.gguf", &model.bytes()))
        .start()
        .await;
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let request = post("/v1/chat/completions", chat.to_string());
    let (response, body) = request.fetch(&server).await;
    assert_eq!(response.status, 400);
    let error = &body.json()["error"];
    assert_eq!(error["type"], "invalid_request_error");
    let message = "The model's chat template rejected the messages: Roles must alternate, not user";
    assert_eq!(error["message"], message);
}

#[tokio::test]
async fn an_invalid_layer_count_is_rejected_with_its_limits() {
    for count in [0, 513, u32::MAX] {
        let model = Gguf::tiny().with("llama.block_count", Value::U32(count));
        let reason = format!("`llama.block_count` must be from 1 to 512 (got {count})");
        let error = load_error(&model).await;
        assert!(error.contains(&reason), "{error}");
    }
}

#[tokio::test]
async fn a_truncated_file_is_reported_as_truncated() {
    let bytes = Gguf::tiny().bytes();
    for length in [10, 100, bytes.len() / 2, bytes.len() - 1] {
        let error = load_error_of(&bytes[..length]).await;
        assert!(error.contains("truncated"), "{length}: {error}");
    }
}

/// Loads every model file of a folder and generates tokens with the model. Prints the file's name first, so that the
/// file that aborts the process is known.
#[tokio::test]
#[ignore = "runs as a separate process, started by the tests below"]
#[expect(
    clippy::print_stdout,
    reason = "the test that starts this process reads its output"
)]
async fn load_every_file_of_the_folder() {
    let folder = std::env::var_os(FOLDER_VARIABLE).expect("a temporary folder");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .expect("a temporary folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    for path in paths {
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        println!("\nBEGIN {name}");
        let server = setup(path).start_loading().await;
        match server.ready().await {
            Err(error) => println!("\nREFUSED {name}: {error}"),
            Ok(()) => {
                let body = json!({"prompt": "abc", "max_tokens": 2, "ignore_eos": true});
                let (response, _) = completion(&body).fetch(&server).await;
                println!("\nWORKS {name}: {}", response.status);
            }
        }
    }
}

/// Returns the files that abort the process. Removes every file that was tried.
fn files_that_abort(folder: &Path) -> Vec<String> {
    let mut aborting = Vec::new();
    let count = fs::read_dir(folder).expect("a temporary folder").count();
    for _ in 0..=count {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "load_every_file_of_the_folder",
                "--ignored",
                "--nocapture",
            ])
            .env(FOLDER_VARIABLE, folder)
            .output()
            .expect("the test starts");
        let output = String::from_utf8_lossy(&child.stdout).into_owned();
        let started: BTreeSet<&str> = output
            .lines()
            .filter_map(|line| line.strip_prefix("BEGIN "))
            .collect();
        if child.status.success() {
            return aborting;
        }
        let last = started.last().expect("at least one file was started");
        aborting.push(format!("{last} ({})", child.status));
        for name in &started {
            fs::remove_file(folder.join(name)).expect("the file can be removed");
        }
    }
    aborting
}

/// Returns other values of the same type.
fn other_values(value: &Value) -> Vec<Value> {
    match value {
        Value::U32(it) => [
            0,
            1,
            2,
            3,
            it.wrapping_mul(2),
            it + 1,
            1000,
            i32::MAX.unsigned_abs(),
            u32::MAX,
        ]
        .map(Value::U32)
        .to_vec(),
        Value::U16(it) => [0, 1, it + 1, u16::MAX].map(Value::U16).to_vec(),
        Value::I32(it) => [0, 1, -1, it + 1, i32::MAX].map(Value::I32).to_vec(),
        Value::U64(_) => [0, 1, u64::MAX].map(Value::U64).to_vec(),
        Value::F32(_) => [0.0, -1.0, f32::NAN, f32::INFINITY]
            .map(Value::F32)
            .to_vec(),
        Value::Bool(it) => vec![Value::Bool(!it)],
        Value::Text(_) => ["", "nonsense"]
            .map(|it| Value::Text(it.to_owned()))
            .to_vec(),
        Value::Texts(it) => other_lengths(it).into_iter().map(Value::Texts).collect(),
        Value::U32s(it) => other_lengths(it).into_iter().map(Value::U32s).collect(),
        Value::I32s(it) => other_lengths(it).into_iter().map(Value::I32s).collect(),
        Value::F32s(it) => other_lengths(it).into_iter().map(Value::F32s).collect(),
    }
}

/// Returns the list with other lengths: empty, 1, one less, and one more (by repeating the last value).
fn other_lengths<T: Clone>(list: &[T]) -> Vec<Vec<T>> {
    let longer = list.iter().chain(list.last()).cloned().collect();
    let shorter = list[..list.len() - 1].to_vec();
    vec![Vec::new(), list[..1].to_vec(), shorter, longer]
}

/// Metadata keys that the tiny model does not have and other models have.
fn missing_keys() -> Vec<(String, Value)> {
    let number = |key: &str| (format!("llama.{key}"), Value::U32(4));
    let token = |key: &str| (format!("tokenizer.ggml.{key}_token_id"), Value::U32(4));
    vec![
        number("expert_group_count"),
        number("expert_group_used_count"),
        number("nextn_predict_layers"),
        number("embedding_length_out"),
        number("pooling_type"),
        number("rope.scaling.original_context_length"),
        number("attention.sliding_window"),
        number("rope.dimension_count_swa"),
        number("attention.key_length_swa"),
        number("split.count"),
        ("split.count".to_owned(), Value::U32(4)),
        ("llama.attention.causal".to_owned(), Value::Bool(true)),
        ("llama.rope.scaling.factor".to_owned(), Value::F32(2.0)),
        token("seperator"),
        token("mask"),
        token("eot"),
        token("eom"),
        token("fim_pre"),
        token("fim_suf"),
        token("fim_mid"),
        token("fim_pad"),
        (
            "tokenizer.ggml.add_eos_token".to_owned(),
            Value::Bool(false),
        ),
        (
            "tokenizer.ggml.suppress_tokens".to_owned(),
            Value::I32s(vec![-1, 1 << 30]),
        ),
    ]
}

fn write_broken_values(folder: &Path) {
    let tiny = Gguf::tiny();
    for (key, value) in tiny.values.iter().cloned().chain(missing_keys()) {
        write_file(
            folder,
            &format!("{key} is missing"),
            &tiny.clone().without(&key).bytes(),
        );
        for (index, other) in other_values(&value).into_iter().enumerate() {
            let shown: String = format!("{other:?}").chars().take(40).collect();
            let name = format!("{key} {index} {}", shown.replace(['/', '"'], ""));
            write_file(folder, &name, &tiny.clone().with(&key, other).bytes());
        }
        let per_layer = tiny.clone().with(&key, Value::U32s(vec![0]));
        write_file(folder, &format!("{key} is a list"), &per_layer.bytes());
        let text = tiny.clone().with(&key, Value::Text("1".to_owned()));
        write_file(folder, &format!("{key} is a text"), &text.bytes());
        let long = tiny.clone().with(&key, Value::U64(1));
        write_file(folder, &format!("{key} is of 64 bits"), &long.bytes());
    }
    for count in [1, 2, 1024, 1025] {
        for used in [0, 1, 2, 3] {
            let experts = tiny
                .clone()
                .with("llama.expert_count", Value::U32(count))
                .with("llama.expert_used_count", Value::U32(used));
            write_file(folder, &format!("experts {count} {used}"), &experts.bytes());
        }
    }
    for model in [
        "llama",
        "bert",
        "t5",
        "rwkv",
        "plamo2",
        "gemma4",
        "none",
        "no_vocab",
        "hybriddna",
    ] {
        let other = tiny
            .clone()
            .with("tokenizer.ggml.model", Value::Text(model.to_owned()));
        write_file(folder, &format!("tokenizer {model}"), &other.bytes());
    }
}

/// Tensor types whose blocks fit into the tiny model's rows: (type, values per block, bytes per block).
const TENSOR_TYPES: [(u32, u64, u64); 17] = [
    (1, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (9, 32, 36),
    (20, 32, 18),
    (24, 1, 1),
    (25, 1, 2),
    (26, 1, 4),
    (27, 1, 8),
    (28, 1, 8),
    (30, 1, 2),
    (39, 32, 17),
    (40, 64, 36),
    (42, 64, 18),
];

fn write_broken_tensors(folder: &Path) {
    let tiny = Gguf::tiny();
    for index in 0..tiny.tensors.len() {
        let change = |what: &str, change: &dyn Fn(&mut support::gguf::Tensor)| {
            let mut model = tiny.clone();
            let name = model.tensors[index].name.clone();
            change(&mut model.tensors[index]);
            write_file(folder, &format!("{name} {what}"), &model.bytes());
        };
        for axis in 0..tiny.tensors[index].dimensions.len() {
            for size in [0, 1, 16, 64, u64::MAX / 2, u64::MAX] {
                change(&format!("{axis} {size}"), &|it| it.dimensions[axis] = size);
                // The data has the size of the new shape, so that only the shape is wrong.
                if size <= 64 {
                    change(&format!("{axis} {size} whole"), &|it| {
                        it.dimensions[axis] = size;
                        let bytes = it.dimensions.iter().product::<u64>() * 4;
                        it.bytes
                            .resize(usize::try_from(bytes).expect("a small file"), 0);
                    });
                }
            }
        }
        change("none", &|it| it.dimensions.clear());
        change("more", &|it| it.dimensions.push(1));
        change("five", &|it| it.dimensions = vec![1; 5]);
        change("name", &|it| it.name = "n".repeat(64));
        change("twice", &|it| it.name = "output_norm.weight".to_owned());
        for kind in [4, 10, 31, 45, u32::MAX] {
            change(&format!("kind {kind}"), &|it| it.kind = kind);
        }
        for (kind, block, bytes) in TENSOR_TYPES {
            change(&format!("kind {kind}"), &|it| {
                it.kind = kind;
                let blocks = it.dimensions.iter().product::<u64>() / block;
                it.bytes
                    .resize(usize::try_from(blocks * bytes).expect("a small file"), 0);
            });
        }
        let mut model = tiny.clone();
        let removed = model.tensors.remove(index);
        write_file(
            folder,
            &format!("{} is missing", removed.name),
            &model.bytes(),
        );
    }
}

#[test]
fn damaged_metadata_never_aborts_the_process() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_broken_values(folder.path());
    let aborting = files_that_abort(folder.path());
    assert!(aborting.is_empty(), "{aborting:#?}");
}

#[test]
fn damaged_tensors_never_abort_the_process() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_broken_tensors(folder.path());
    let aborting = files_that_abort(folder.path());
    assert!(aborting.is_empty(), "{aborting:#?}");
}
