//! `tokenway-perf model` with the test runner instead of a real model. Each compared server is a script that starts the
//! executable `tokenway`, which `cargo nextest run` builds for the whole workspace.

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::{
    RunOutput, assert_self_contained, path_text, perf_command, read_json, run, write_program,
};
use tempfile::TempDir;

mod support;

/// A temporary folder for the programs of servers and the files of a report.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        path_text(&self.0.path().join(name)).to_owned()
    }

    /// Writes a script that serves the test runner, with this time between tokens. It listens on the port that its
    /// arguments name.
    fn add_server(&self, name: &str, interval_ms: u32) -> String {
        let tokenway = Path::new(env!("CARGO_BIN_EXE_tokenway-perf")).with_file_name("tokenway");
        let tokenway = path_text(&tokenway);
        self.add_program(
            name,
            &format!(
                r#"case "$1" in *version) echo "{name} 1.0"; exit ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
    --port) port=$2 ;;
    --http-listen) port=${{2##*:}} ;;
    esac
    shift
done
exec {tokenway} serve --runner llm_test --test-runner-frequency-ms {interval_ms} \
    --http-listen "127.0.0.1:$port" --grpc-listen 127.0.0.1:0
"#
            ),
        )
    }

    fn add_program(&self, name: &str, script: &str) -> String {
        let path = self.path(name);
        write_program(&path, script);
        path
    }
}

/// Runs `model` with one round.
fn model(tokenway: &str, llama_server: &str, arguments: &[&str]) -> RunOutput {
    let mut command = perf_command(["model", "--rounds", "1", "--model-path", "model.gguf"]);
    command.args(["--tokenway", tokenway, "--llama-server", llama_server]);
    command.args(arguments);
    run(command)
}

#[test]
fn every_scenario_is_measured_on_every_server() {
    let folder = Folder::new();
    let [own, theirs, vllm] = ["own", "theirs", "vllm"].map(|name| folder.add_server(name, 2));
    let [json, html, svg] = ["model.json", "model.html", "model.svg"].map(|name| folder.path(name));
    let files = ["--json", &json, "--html", &html, "--picture", &svg];
    let ran = model(&own, &theirs, &[&["--vllm", &vllm], &files[..]].concat());
    ran.assert_succeeded();
    let json = read_json(Path::new(&json));
    assert_eq!(json["cells"].as_array().map(Vec::len), Some(18), "{ran}");
    assert_eq!(json["targets"].as_array().map(Vec::len), Some(8), "{ran}");
    for list in ["notes", "faults"] {
        assert_eq!(json[list].as_array().map(Vec::len), Some(0), "{ran}");
    }
    for cell in json["cells"].as_array().expect("cells") {
        let figures = cell["rounds"][0]["figures"].as_object().expect("figures");
        assert!(figures.values().all(Value::is_f64), "{cell}");
    }
    for server in 0..3 {
        let counts = |scenario: usize| &json["cells"][3 * scenario + server]["rounds"][0]["counts"];
        assert_eq!(counts(1)["completion_tokens"], 8 * 64, "{ran}");
        // 32 conversations of two turns, and five further turns of the last one.
        assert_eq!(counts(4)["requests"], 69, "{ran}");
    }
    for text in [
        "theirs 1.0",
        "32 conversations, one after the other",
        "vLLM",
    ] {
        assert!(ran.out.contains(text), "{ran}");
    }
    let page = fs::read_to_string(&html).expect("a page");
    assert_self_contained(&page);
    let picture = fs::read_to_string(&svg).expect("a picture");
    assert!(page.contains(picture.trim()), "the page has no picture");
}

#[test]
fn the_report_says_that_vllm_serves_the_weights_of_its_script() {
    let folder = Folder::new();
    let [own, theirs, vllm] = ["own", "theirs", "vllm"].map(|name| folder.add_server(name, 1));
    let [json, html] = ["model.json", "model.html"].map(|name| folder.path(name));
    let arguments = ["--only", "long-prompt", "--json", &json, "--html", &html];
    let ran = model(
        &own,
        &theirs,
        &[&["--vllm", &vllm], &arguments[..]].concat(),
    );
    ran.assert_succeeded();
    let weights = format!("the weights that its script has converted ({vllm})");
    let line = format!("\nvLLM: vllm 1.0; it serves {weights}\n");
    assert!(ran.out.contains(&line), "{ran}");
    let settings = &read_json(Path::new(&json))["settings"];
    assert_eq!(settings["model"], "model.gguf");
    let servers = settings["servers"].as_array().expect("servers").iter();
    let of_servers: Vec<_> = servers.map(|server| &server["other_weights"]).collect();
    assert_eq!(
        of_servers,
        [&Value::Null, &Value::Null, &Value::String(weights)]
    );
    let page = fs::read_to_string(&html).expect("a page");
    assert!(page.contains("it serves the weights that its script has converted"));
}

#[test]
fn a_missed_target_fails_only_with_check() {
    let folder = Folder::new();
    let (own, theirs) = (folder.add_server("own", 3), folder.add_server("theirs", 1));
    let only = ["--only", "decode-one"];
    model(&own, &theirs, &only).assert_succeeded();
    let ran = model(&own, &theirs, &[&only[..], &["--check"]].concat());
    assert_eq!((ran.code, ran.err.as_str()), (Some(1), ""), "{ran}");
    assert!(ran.out.contains("FAIL  decoding, 1 stream"), "{ran}");
}

#[test]
fn a_server_that_does_not_start_is_named_with_its_last_words() {
    let folder = Folder::new();
    let own = folder.add_server("own", 1);
    let script = "[ \"$1\" = --version ] && exec echo broken 1.0\necho no such model >&2\nexit 3\n";
    let broken = folder.add_program("broken", script);
    let ran = model(&own, &broken, &["--only", "decode-one"]);
    ran.assert_failed(&format!(
        "{broken} ended with exit status: 3:\nno such model"
    ));
    let ran = model(&own, "/no/such/server", &[]);
    assert_eq!(ran.code, Some(1), "{ran}");
    assert!(
        ran.err.starts_with("error: cannot run /no/such/server"),
        "{ran}"
    );
}
