use std::ffi::OsString;

use super::*;

/// What these arguments ask for, after `tokenway`.
fn read_line(arguments: &[&str]) -> Result<Task, ConfigError> {
    read(["tokenway"].iter().chain(arguments).map(OsString::from))
}

fn parts(arguments: &[&str]) -> ServerParts {
    match read_line(arguments) {
        Ok(Task::Serve(parts)) => *parts,
        Ok(Task::Complete(_)) => panic!("{arguments:?} asks for a completion"),
        Err(error) => panic!("{arguments:?}: {error}"),
    }
}

fn refusal(arguments: &[&str]) -> String {
    match read_line(arguments) {
        Ok(_) => panic!("{arguments:?} is taken"),
        Err(error) => error.to_string(),
    }
}

fn engine(parts: &ServerParts) -> &crate::server::EngineParts {
    match &parts.source {
        Source::Engine(engine) => engine,
        Source::Remote(_) => panic!("there is no engine"),
    }
}

fn settings_file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenway.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    (folder, path)
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let parts = parts(&[]);
    let http = parts.http.as_ref().unwrap();
    assert_eq!(http.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(http.stream_format, StreamFormat::Ndjson);
    assert_eq!(parts.grpc.as_ref().unwrap().to_string(), "127.0.0.1:50051");
    assert_eq!(parts.request_timeout, Duration::from_secs(600));
    let engine = engine(&parts);
    assert_eq!(engine.queue_depth, 1_024);
    assert_eq!(engine.slow_reader_timeout, Duration::from_secs(10));
    let model = &engine.models[0];
    assert_eq!(
        (model.name.as_str(), model.workers, model.slots),
        ("llm_test", 1, 1_024)
    );
}

#[test]
fn each_command_opens_its_own_doors() {
    let engine = parts(&["engine"]);
    assert!(engine.http.is_none() && engine.grpc.is_some());
    let gateway = parts(&[
        "gateway",
        "--engine",
        "http://a:1,unix:/b",
        "--engine",
        "http://c:2",
    ]);
    assert!(gateway.http.is_some() && gateway.grpc.is_none());
    let Source::Remote(engines) = gateway.source else {
        panic!("it has an engine of its own")
    };
    assert_eq!(engines, ["http://a:1", "unix:/b", "http://c:2"]);
}

#[test]
fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
    let text = "slots = 3\nqueue_depth = 5\ntest_runner_frequency_ms = 0.5\nhttp_listen = \"unix:/a\"\n\
                drain_grace = 0.25\nstream_format = \"sse\"\ninsecure = true";
    let (_folder, path) = settings_file(text);
    let parts = parts(&["serve", "--config", &path, "--slots", "7"]);
    assert_eq!(engine(&parts).models[0].slots, 7);
    assert_eq!(engine(&parts).queue_depth, 5);
    assert_eq!(parts.drain.grace, Duration::from_millis(250));
    let http = parts.http.unwrap();
    assert_eq!(
        (http.listen.to_string().as_str(), http.stream_format),
        ("unix:/a", StreamFormat::Sse)
    );
}

#[test]
fn one_file_serves_every_command() {
    let (_folder, path) = settings_file("engine = [\"http://a:1\"]\nslots = 3");
    let Source::Remote(engines) = parts(&["gateway", "--config", &path]).source else {
        panic!("it has an engine of its own")
    };
    assert_eq!(engines, ["http://a:1"]);
    assert_eq!(engine(&parts(&["--config", &path])).models[0].slots, 3);
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    for (text, named) in [
        ("slotz = 3", "'slotz' is unknown; the keys are "),
        ("slotz = 3", "request_timeout, runner, slots, "),
        (
            "slots = \"many\"",
            "slots: invalid type: string \"many\", expected a whole number",
        ),
        (
            "test_runner_frequency_ms = true",
            "test_runner_frequency_ms: invalid type: boolean `true`, expected a number",
        ),
        (
            "engine = \"http://a:1\"",
            "engine: invalid type: string \"http://a:1\", expected a list",
        ),
        ("runner = \"magic\"", "runner: it must be llm_test or llama"),
        ("slots = 0", "slots: it must be at least 1"),
        ("workers = 65536", "workers: 65536 is too many"),
        ("drain_grace = -1", "drain_grace"),
        ("http_listen = \"nowhere\"", "http_listen"),
        ("slots = ", "slots"),
    ] {
        let (_folder, path) = settings_file(text);
        let command = if text.starts_with("engine") {
            "gateway"
        } else {
            "serve"
        };
        let refusal = refusal(&[command, "--config", &path]);
        assert!(
            refusal.contains(named) && refusal.contains(&path),
            "{refusal}"
        );
    }
    assert!(refusal(&["--config", "/nowhere.toml"]).contains("/nowhere.toml"));
}

#[test]
fn what_is_wrong_on_the_command_line_is_named() {
    for (arguments, named) in [
        (
            &["serve", "--slots", "0"][..],
            "'--slots <N>': it must be at least 1",
        ),
        (
            &["serve", "--workers", "0"],
            "'--workers <N>': it must be at least 1",
        ),
        (
            &["serve", "--threads", "0"],
            "'--threads <N>': it must be at least 1",
        ),
        (
            &["serve", "--context-length", "0"],
            "'--context-length <TOKENS>': it must be at least 1",
        ),
        (&["serve", "--drain-grace", "-1"], "--drain-grace"),
        (&["serve", "--request-timeout", "soon"], "--request-timeout"),
        (&["serve", "--http-listen", "8000"], "--http-listen"),
        (&["serve", "--stream-format", "xml"], "--stream-format"),
        (&["serve", "--runner", "magic"], "--runner"),
        (
            &["serve", "--test-runner-frequency-ms", "nan"],
            "--test-runner-frequency-ms",
        ),
        (
            &["serve", "--runner", "llm_test", "--model-path", "a.gguf"],
            "--model-path",
        ),
        (&["serve", "--threads", "2"], "--threads"),
        (&["serve", "--request-timeout", "0"], "--request-timeout"),
        (&["serve", "--model-name", ""], "--model-name"),
        (&["gateway", "--engine", "http://a:1/path"], "--engine"),
        (&["serve", "--runner", "llama"], "llama"),
        (&["gateway"], "--engine"),
        (&["gateway", "--engine", "https://a:1"], "--engine"),
        (
            &["gateway", "--engine", "http://a:1", "--slots", "1"],
            "--slots",
        ),
        (&["engine", "--http-listen", "127.0.0.1:0"], "--http-listen"),
    ] {
        let refusal = refusal(arguments);
        assert!(refusal.contains(named), "{arguments:?}: {refusal}");
    }
}

#[test]
fn an_address_that_others_reach_needs_insecure_said_to_it() {
    for (setting, address) in [("--http-listen", "0.0.0.0:0"), ("--grpc-listen", "[::]:0")] {
        let refusal = refusal(&["serve", setting, address]);
        assert!(
            refusal.contains(setting) && refusal.contains("--insecure"),
            "{refusal}"
        );
        parts(&["serve", setting, address, "--insecure"]);
    }
}
