//! The program `tokenway` with models from a small local Hub: serving, worker processes, settings files, and
//! `tokenway models`.

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use axum::http::StatusCode;
use rustix::process::Signal;
use serde_json::json;
use support::gguf::{Gguf, Value};
use support::http::{completion, get};
use support::hub::{Fault, TestHub, incomplete, snapshot};
use support::program::{Program, tokenway};
use support::running_program::RunningProgram;

const FILE: &str = "tiny-Q8_0.gguf";
const TOKEN: &str = "hf_secret_token";

/// Returns `tokenway serve` on free ports with this Hub and this cache.
fn serve(hub: &TestHub, cache: &Path) -> Program {
    let free = "127.0.0.1:0";
    let serve = with_hub(tokenway().arg("serve"), hub, cache);
    serve.args([
        "--http-listen",
        free,
        "--grpc-listen",
        free,
        "--drain-grace",
        "0",
    ])
}

fn with_hub(program: Program, hub: &TestHub, cache: &Path) -> Program {
    let program = program.env("HF_ENDPOINT", &hub.endpoint);
    program.env("HF_HUB_CACHE", cache)
}

/// Waits until a server is ready. Returns the address of its HTTP API and its last start-up line.
async fn wait_until_ready(server: &mut RunningProgram) -> (String, String) {
    let http = server.read_line().await;
    let http = http
        .split("http://")
        .nth(1)
        .and_then(|it| it.split(' ').next());
    let http = http.expect("the URL of the HTTP API").to_owned();
    loop {
        let line = server.read_line().await;
        if line.starts_with("ready ") {
            return (http, line);
        }
    }
}

async fn assert_completes(address: &str, model: &str) {
    let body = json!({"model": model, "prompt": "abc", "max_tokens": 4, "ignore_eos": true});
    let mut response = completion(&body).send_to(address).await;
    let body = response.read_rest().await.json();
    assert_eq!(body["usage"]["completion_tokens"], 4, "{body}");
}

#[tokio::test]
async fn a_model_on_the_hub_is_downloaded_and_served_under_its_name() {
    let cache = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let mut server = serve(&hub, cache.path())
        .args(["--model", "hf:org/repo:q8_0"])
        .start();
    let (address, ready) = wait_until_ready(&mut server).await;
    assert!(
        ready.contains("org/repo:q8_0 (llama; workers: 1"),
        "{ready}"
    );
    assert_completes(&address, "org/repo:q8_0").await;
    let mut response = get("/v1/models/org/repo:q8_0").send_to(&address).await;
    assert_eq!(response.read_rest().await.json()["id"], "org/repo:q8_0");
    drop(server);
    drop(hub);
    let gone = TestHub::start(&[]).await;
    let mut server = serve(&gone, cache.path())
        .args(["--model", "hf:org/repo:q8_0"])
        .start();
    wait_until_ready(&mut server).await;
    assert_eq!(gone.requests(), [], "a cached model needs no request");
}

#[tokio::test]
async fn worker_processes_get_the_file_of_one_download() {
    let cache = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let mut server = serve(&hub, cache.path())
        .args(["--isolation", "process", "--workers", "2"])
        .env("TOKENWAY_MODEL", "hf:org/repo")
        .start();
    let (address, _) = wait_until_ready(&mut server).await;
    assert_completes(&address, "org/repo").await;
    assert_eq!(hub.downloads(), [None]);
}

#[tokio::test]
async fn each_model_table_can_name_a_model_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    let other = Gguf::tiny().with("general.name", Value::Text("other".to_owned()));
    let (tiny, other) = (Gguf::tiny().bytes(), other.bytes());
    let hub = TestHub::start(&[(FILE, &tiny), ("tiny-F16.gguf", &other)]).await;
    let settings = folder.path().join("models.toml");
    let tables = "[[model]]\nname = \"a\"\nmodel = \"hf:org/repo\"\n\
                  [[model]]\nname = \"b\"\naliases = [\"c\"]\nmodel = \"hf:org/repo:F16\"\n\
                  [[model]]\nname = \"test\"\n";
    fs::write(&settings, tables).unwrap();
    let check = with_hub(tokenway().args(["config", "check"]), &hub, folder.path());
    check.arg(&settings).run().await.expect_success();
    assert_eq!(hub.requests(), [], "a check needs no network");
    let cache = folder.path().join("cache");
    let mut server = serve(&hub, &cache).arg("--config").arg(&settings).start();
    let (address, _) = wait_until_ready(&mut server).await;
    for model in ["a", "b", "c"] {
        assert_completes(&address, model).await;
    }
    assert_eq!(hub.downloads().len(), 2);
}

#[tokio::test]
async fn the_only_model_of_a_settings_file_can_be_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let settings = folder.path().join("model.toml");
    fs::write(&settings, "model = \"hf:org/repo\"\nmodel_name = \"m\"\n").unwrap();
    let show = with_hub(tokenway().args(["config", "show"]), &hub, folder.path());
    let shown = show
        .arg("--config")
        .arg(&settings)
        .run()
        .await
        .expect_success();
    assert!(shown.contains("\nmodel = \"hf:org/repo\" "), "{shown}");
    let cache = folder.path().join("cache");
    let mut server = serve(&hub, &cache).arg("--config").arg(&settings).start();
    let (address, _) = wait_until_ready(&mut server).await;
    assert_completes(&address, "m").await;
}

#[tokio::test]
async fn a_model_that_is_not_available_stops_the_program_before_anything_listens() {
    let cache = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, b"not a model")]).await;
    for (model, code, expected) in [
        ("hf:org/nothing", 1, "tokenway: --model hf:org/nothing: "),
        (
            "hf:org/repo:Q4_K_M",
            1,
            "no model with the quantization Q4_K_M; it has hf:org/repo:tiny-Q8_0.gguf",
        ),
        (
            "hf:org/repo",
            2,
            "tiny-Q8_0.gguf: this is not a GGUF model file; choose another model; if the cached file is damaged, delete the \
             folder models--org--repo in the cache and start again",
        ),
        ("hf:org", 2, "write hf:OWNER/REPO"),
    ] {
        let outcome = serve(&hub, cache.path())
            .args(["--model", model])
            .run()
            .await;
        assert_eq!(
            (outcome.code, &*outcome.stdout),
            (Some(code), ""),
            "{outcome:?}"
        );
        assert!(outcome.stderr.contains(expected), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_setting_that_does_not_fit_is_reported_before_the_download() {
    let cache = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let model = ["--model", "hf:org/repo"];
    for (arguments, expected) in [
        (&["--slots", "257"][..], "--slots must be at most 256"),
        (
            &["--runner", "llm_test"],
            "--model is for the runner llama only",
        ),
        (
            &["--model-path", "a.gguf"],
            "--model-path and --model are both set; remove --model-path",
        ),
        (&["--cache-type-k", "q9"], "--cache-type-k"),
        (&["--flash-attention", "maybe"], "--flash-attention"),
        (&["--devices", "CUDA0,"], "--devices has an empty name"),
    ] {
        let outcome = serve(&hub, cache.path())
            .args(model)
            .args(arguments)
            .run()
            .await;
        assert!(
            outcome.code == Some(2) && outcome.stderr.contains(expected),
            "{outcome:?}"
        );
    }
    for (variable, value, expected) in [
        (
            "HF_ENDPOINT",
            "huggingface.co",
            "HF_ENDPOINT must be an address such as",
        ),
        (
            "HF_TOKEN",
            "hf_se\ncret",
            "HF_TOKEN must be printable ASCII",
        ),
    ] {
        let server = serve(&hub, cache.path()).args(model).env(variable, value);
        let outcome = server.run().await;
        assert!(
            outcome.code == Some(2) && outcome.stderr.contains(expected),
            "{outcome:?}"
        );
        assert!(!outcome.stderr.contains("hf_se"), "{outcome:?}");
    }
    assert_eq!(hub.requests(), []);
}

#[tokio::test]
async fn the_token_appears_in_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    hub.require_token(TOKEN, StatusCode::UNAUTHORIZED);
    fs::write(folder.path().join("token"), format!("{TOKEN}\n")).unwrap();
    let serve = |cache: &str| {
        let server = serve(&hub, &folder.path().join(cache)).env("TOKENWAY_LOG", "trace");
        server.args(["--model", "hf:org/repo"])
    };
    let variable = ("HF_TOKEN", TOKEN.to_owned());
    let home = ("HF_HOME", folder.path().display().to_string());
    for (cache, (name, value)) in [("a", variable), ("b", home)] {
        let log = folder.path().join("log");
        let mut server = serve(cache).env(name, &value).log_to(&log).start();
        wait_until_ready(&mut server).await;
        let log = fs::read_to_string(&log).unwrap();
        assert!(log.contains("downloading") && !log.contains(TOKEN), "{log}");
    }
    let show = tokenway().args(["config", "show", "--model", "hf:org/repo"]);
    let shown = with_hub(show, &hub, folder.path())
        .env("HF_TOKEN", TOKEN)
        .run()
        .await;
    assert!(!shown.expect_success().contains(TOKEN));
    hub.require_token("another", StatusCode::FORBIDDEN);
    let outcome = serve("c").env("HF_TOKEN", TOKEN).run().await;
    assert!(
        outcome.stderr.contains("denies access (403)"),
        "{outcome:?}"
    );
    assert!(!format!("{outcome:?}").contains(TOKEN), "{outcome:?}");
}

#[tokio::test]
async fn a_signal_ends_a_download_that_the_next_start_continues() {
    let cache = tempfile::tempdir().unwrap();
    let tiny = Gguf::tiny().bytes();
    let hub = TestHub::start(&[(FILE, &tiny)]).await;
    let unfinished = incomplete(cache.path(), &tiny);
    fs::create_dir_all(unfinished.parent().unwrap()).unwrap();
    fs::write(&unfinished, &tiny[..1000]).unwrap();
    hub.inject(&[Fault::StallAfter(0)]);
    let server = || serve(&hub, cache.path()).args(["--model", "hf:org/repo"]);
    let mut stalled = server().log_to_file(Stdio::piped()).start();
    stalled.wait_for_log("downloading").await;
    stalled.signal(Signal::TERM);
    stalled.wait_for_log("the next start continues it").await;
    assert_eq!(stalled.wait_for_exit_code().await, Some(0));
    assert_eq!(fs::read(&unfinished).unwrap(), tiny[..1000]);
    hub.clear_faults();
    let mut server = server().start();
    wait_until_ready(&mut server).await;
    let last = hub.downloads().pop();
    assert_eq!(last, Some(Some("bytes=1000-".to_owned())));
}

#[tokio::test]
async fn a_remote_worker_downloads_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let socket = format!("unix:{}", folder.path().join("w.sock").display());
    let mut engine = serve(&hub, folder.path())
        .args([
            "--runner",
            "attached",
            "--model-name",
            "m",
            "--worker-listen",
            &socket,
        ])
        .start();
    let worker = with_hub(tokenway().arg("worker"), &hub, &folder.path().join("cache"));
    let _worker = worker
        .args(["--engine", &socket, "--model", "hf:org/repo"])
        .start();
    let (address, _) = wait_until_ready(&mut engine).await;
    assert_completes(&address, "m").await;
    assert!(snapshot(&folder.path().join("cache"), FILE).exists());
}

#[tokio::test]
async fn the_command_models_lists_the_cache_or_says_how_to_fill_it() {
    let cache = tempfile::tempdir().unwrap();
    let hub = TestHub::start(&[(FILE, &Gguf::tiny().bytes())]).await;
    let models = || with_hub(tokenway().arg("models"), &hub, cache.path());
    let empty = models().run().await.expect_success();
    let shown = format!("There are no models in {};", cache.path().display());
    assert!(
        empty.starts_with(&shown) && empty.contains("tokenway serve --model hf:"),
        "{empty}"
    );
    let mut server = serve(&hub, cache.path())
        .args(["--model", "hf:org/repo"])
        .start();
    wait_until_ready(&mut server).await;
    let table = models().run().await.expect_success();
    let lines: Vec<Vec<_>> = table
        .lines()
        .map(|it| it.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["MODEL", "QUANTIZATION", "SIZE", "FILES", "DATE"]);
    assert_eq!(lines[1][..2], ["hf:org/repo:tiny-Q8_0.gguf", "Q8_0"]);
    assert_eq!(lines.len(), 2, "{table}");
}

#[tokio::test]
async fn a_real_model_is_downloaded_and_streams_a_completion() {
    let cache = tempfile::tempdir().unwrap();
    let bytes = fs::read(support::model_path()).unwrap();
    let hub = TestHub::start(&[("SmolLM2-135M-Instruct.Q4_1.gguf", &bytes)]).await;
    hub.inject(&[Fault::CutAfter(30_000_000), Fault::CutAfter(1)]);
    drop(bytes);
    let mut server = serve(&hub, cache.path())
        .args(["--model", "hf:org/repo:Q4_1"])
        .start();
    let (address, _) = wait_until_ready(&mut server).await;
    let body = json!({
        "prompt": "The capital of France is", "max_tokens": 2, "stream": true, "temperature": 0,
    });
    let mut response = completion(&body).send_to(&address).await;
    let line = response.read_json_line().await.expect("a line");
    assert_eq!(line["choices"][0]["text"], " Paris");
    assert_eq!(hub.downloads().len(), 3);
}
