use std::time::Duration;

use super::*;
use crate::gateway::StreamFormat;

#[test]
fn a_flag_overrides_the_file_and_the_file_overrides_the_default() {
    let text = "slots = 3\nqueue_depth = 5\ntest_runner_frequency_ms = 0.5\nhttp_listen = \"unix:/a\"\n\
                drain_grace = 0.25\nstream_format = \"sse\"\ninsecure = true";
    let (_folder, path) = settings_file(text);
    let parts = server_parts(&["serve", "--config", &path, "--slots", "7"]);
    assert_eq!(engine(&parts).models[0].slots, 7);
    assert_eq!(engine(&parts).models[0].queue_depth, 5);
    assert_eq!(parts.drain.grace, Duration::from_millis(250));
    let http = parts.http.unwrap();
    assert_eq!(
        (http.listen.to_string().as_str(), http.stream_format),
        ("unix:/a", StreamFormat::Sse)
    );
}

#[test]
fn errors_in_a_file_name_the_key() {
    for (text, expected) in [
        ("slotz = 3", "'slotz' is unknown; known keys are "),
        ("slotz = 3", "resume_timeout, runner, slots, "),
        (
            "slots = \"many\"",
            "slots: invalid type: string \"many\", expected an integer",
        ),
        (
            "test_runner_frequency_ms = true",
            "test_runner_frequency_ms: invalid type: boolean `true`, expected a number",
        ),
        (
            "engine = \"http://a:1\"",
            "engine: invalid type: string \"http://a:1\", expected a list",
        ),
        ("runner = \"magic\"", "runner: must be llm_test, llama"),
        (
            "isolation = \"jail\"",
            "isolation: must be thread or process",
        ),
        ("worker_listen = \"nowhere\"", "worker_listen"),
        ("slots = 0", "slots: must be at least 1 (got 0)"),
        ("workers = 65536", "workers: 65536 is too large"),
        ("drain_grace = -1", "drain_grace"),
        ("http_listen = \"nowhere\"", "http_listen"),
        (
            "allowed_hosts = [\"a/b\"]",
            "allowed_hosts: 'a/b' must be a host name",
        ),
        (
            "cors_origins = [\"null\"]",
            "cors_origins: 'null' must be an origin",
        ),
        ("slots = ", "slots"),
    ] {
        let (_folder, path) = settings_file(text);
        let command = if text.starts_with("engine") {
            "gateway"
        } else {
            "serve"
        };
        let error = error_of(&[command, "--config", &path]);
        assert!(error.contains(expected) && error.contains(&path), "{error}");
    }
    assert!(error_of(&["--config", "/nowhere.toml"]).contains("/nowhere.toml"));
}

#[test]
fn errors_on_the_command_line_name_the_flag() {
    for (arguments, expected) in [
        (
            &["serve", "--slots", "0"][..],
            "'--slots <N>': must be at least 1 (got 0)",
        ),
        (
            &["serve", "--workers", "0"],
            "'--workers <N>': must be at least 1 (got 0)",
        ),
        (
            &["serve", "--threads", "0"],
            "'--threads <N>': must be at least 1 (got 0)",
        ),
        (
            &["serve", "--context-length", "0"],
            "'--context-length <TOKENS>': must be at least 1 (got 0)",
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
        (
            &["serve", "--model-name", ""],
            "--model-name must not be empty",
        ),
        (
            &["serve", "--model-name", &"a".repeat(257)],
            "--model-name must be at most 256 bytes long (got 257)",
        ),
        (&["gateway", "--engine", "http://a:1/path"], "--engine"),
        (&["serve", "--runner", "llama"], "llama"),
        (&["gateway"], "--engine"),
        (&["gateway", "--engine", "ftp://a:1"], "--engine"),
        (
            &["gateway", "--engine", "http://a:1", "--slots", "1"],
            "--slots",
        ),
        (&["engine", "--http-listen", "127.0.0.1:0"], "--http-listen"),
    ] {
        let error = error_of(arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
}

#[test]
fn errors_in_a_file_name_the_line_and_the_column() {
    for (text, expected) in [
        (
            "insecure = false\nslots = 0",
            ":2:1: slots: must be at least 1",
        ),
        ("\n  slotz = 1", ":2:3: the key 'slotz' is unknown"),
        (
            "slots = 1\n[[model]]\nname = 1",
            ":3:1: model[1].name: invalid type",
        ),
        ("# é\nslots = [1, é]", ":2:13: "),
        (
            "http_listen = \"0.0.0.0:1\"",
            ":1:1: http_listen 0.0.0.0:1 can be reached",
        ),
        (
            "slots = 1\nthreads = 2",
            ":2:1: threads is for the runner llama only",
        ),
        (
            "any_model = true\n[[model]]\nthreads = 2",
            ":3:1: model[1].threads is for",
        ),
        (
            "[[model]]\nname = \"a\"\n[[model]]\nslots = 1",
            ":3:1: model[2].name is missing",
        ),
    ] {
        let (_folder, path) = settings_file(text);
        let error = error_of(&["serve", "--config", &path]);
        assert!(
            error.contains(&format!("{path}{expected}")),
            "{text}: {error}"
        );
    }
}

#[test]
fn a_key_that_a_flag_overrides_is_still_checked() {
    let (_folder, path) = settings_file("slots = 0");
    let error = error_of(&["--config", &path, "--slots", "1"]);
    assert!(error.contains("slots: must be at least 1"), "{error}");
}
