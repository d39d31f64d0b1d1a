use std::ffi::OsString;

use super::*;
use crate::gateway::{OriginPolicy, StreamFormat, UnknownFields};
use crate::scheduler::UnknownModel;
use crate::server::Isolation;

/// Reads the command line `tokenway <arguments>`.
fn read_line(arguments: &[&str]) -> Result<Task, ConfigError> {
    read(["tokenway"].iter().chain(arguments).map(OsString::from))
}

fn parts(arguments: &[&str]) -> ServerParts {
    match read_line(arguments) {
        Ok(Task::Serve(parts)) => *parts,
        Ok(Task::Work(_) | Task::Complete(_)) => panic!("{arguments:?} is not a server command"),
        Err(error) => panic!("{arguments:?}: {error}"),
    }
}

fn error_of(arguments: &[&str]) -> String {
    match read_line(arguments) {
        Ok(_) => panic!("{arguments:?} is accepted"),
        Err(error) => error.to_string(),
    }
}

fn engine(parts: &ServerParts) -> &crate::server::EngineParts {
    match &parts.source {
        Source::Engine(engine) => engine,
        Source::Remote(_) => panic!("the source is not a local engine"),
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
fn defaults_match_the_documented_contract() {
    let parts = parts(&[]);
    let http = parts.http.as_ref().unwrap();
    assert_eq!(http.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(http.stream_format, StreamFormat::Ndjson);
    assert_eq!(parts.grpc.as_ref().unwrap().to_string(), "127.0.0.1:50051");
    assert_eq!(parts.request_timeout, Duration::from_secs(600));
    let engine = engine(&parts);
    let model = &engine.models[0];
    assert_eq!(model.queue_depth, 1_024);
    assert_eq!(model.slow_reader_timeout, Duration::from_secs(10));
    assert_eq!(engine.models.len(), 1);
    assert_eq!(model.aliases, ["test"]);
    assert_eq!(engine.unknown_model, UnknownModel::Refuse);
    assert_eq!(http.unknown_fields, UnknownFields::Refuse);
    assert_eq!(http.headers_after, Some(Duration::from_secs(30)));
    assert_eq!(
        (model.name.as_str(), model.workers, model.slots),
        ("llm_test", 1, 1_024)
    );
}

/// The names and aliases of the models.
fn names(parts: &ServerParts) -> Vec<(&str, Vec<&str>)> {
    let models = engine(parts).models.iter();
    models
        .map(|model| {
            let aliases = model.aliases.iter().map(String::as_str);
            (model.name.as_str(), aliases.collect())
        })
        .collect()
}

#[test]
fn aliases_come_from_commas_repeated_flags_and_the_file() {
    let line = ["--model-alias", "a,b", "--model-alias", "c"];
    let by_flag = parts(&line);
    assert_eq!(names(&by_flag), [("llm_test", vec!["a", "b", "c", "test"])]);
    let (_folder, path) = settings_file("model_alias = [\"a\"]\nany_model = true");
    let by_file = parts(&["--config", &path]);
    assert_eq!(names(&by_file), [("llm_test", vec!["a", "test"])]);
    assert_eq!(engine(&by_file).unknown_model, UnknownModel::First);
    let both = parts(&["--config", &path, "--model-alias", "b", "--any-model=false"]);
    assert_eq!(names(&both), [("llm_test", vec!["b", "test"])]);
    assert_eq!(engine(&both).unknown_model, UnknownModel::Refuse);
}

#[test]
fn redundant_and_empty_aliases_are_rejected() {
    for (aliases, expected) in [
        ("llm_test", "--model-alias llm_test is the model's own name"),
        ("a,b,a", "--model-alias a is set twice"),
        ("a,", "--model-alias must not be empty"),
    ] {
        let error = error_of(&["--model-alias", aliases]);
        assert!(error.contains(expected), "{error}");
    }
    let (_folder, path) = settings_file("[[model]]\nname = \"a\"");
    let error = error_of(&["--config", &path, "--model-alias", "b"]);
    assert!(error.contains("set 'aliases' in each table"), "{error}");
}

#[test]
fn the_first_test_runner_gets_the_alias_test_unless_it_is_taken() {
    let renamed = parts(&["--model-name", "test"]);
    assert_eq!(names(&renamed), [("test", vec![])]);
    let two = "[[model]]\nname = \"a\"\n[[model]]\nname = \"b\"\n";
    let (_folder, path) = settings_file(two);
    let first = parts(&["--config", &path]);
    assert_eq!(names(&first), [("a", vec!["test"]), ("b", vec![])]);
    let (_folder, path) = settings_file(&format!("{two}aliases = [\"test\"]"));
    let taken = parts(&["--config", &path]);
    assert_eq!(names(&taken), [("a", vec![]), ("b", vec!["test"])]);
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        "unix:/a/b",
    ];
    assert_eq!(names(&parts(&attached)), [("m", vec![])]);
}

#[test]
fn unknown_fields_and_headers_after_are_http_settings() {
    let http = |line: &[&str]| parts(line).http.expect("the HTTP API is enabled");
    let ignoring = http(&["--unknown-fields", "ignore", "--headers-after", "0.05"]);
    assert_eq!(ignoring.unknown_fields, UnknownFields::Ignore);
    assert_eq!(ignoring.headers_after, Some(Duration::from_millis(50)));
    let gateway = http(&["gateway", "--engine", "http://a:1", "--headers-after", "0"]);
    assert_eq!(gateway.headers_after, None);
    let (_folder, path) = settings_file("unknown_fields = \"ignore\"\nheaders_after = 2");
    let by_file = http(&["--config", &path]);
    assert_eq!(by_file.unknown_fields, UnknownFields::Ignore);
    assert_eq!(by_file.headers_after, Some(Duration::from_secs(2)));
    let error = error_of(&["--unknown-fields", "drop"]);
    assert!(error.contains("must be refuse or ignore"), "{error}");
}

#[test]
fn each_command_opens_its_own_apis() {
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
        panic!("the source is a local engine")
    };
    assert_eq!(engines, ["http://a:1", "unix:/b", "http://c:2"]);
}

#[test]
fn a_flag_overrides_the_file_and_the_file_overrides_the_default() {
    let text = "slots = 3\nqueue_depth = 5\ntest_runner_frequency_ms = 0.5\nhttp_listen = \"unix:/a\"\n\
                drain_grace = 0.25\nstream_format = \"sse\"\ninsecure = true";
    let (_folder, path) = settings_file(text);
    let parts = parts(&["serve", "--config", &path, "--slots", "7"]);
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
fn hosts_and_origins_are_lists_in_flags_and_in_the_file() {
    let origins = |hosts: &[&str], origins: &[&str]| OriginPolicy {
        allowed_hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        cors_origins: origins.iter().map(|it| it.parse().unwrap()).collect(),
    };
    let text = "allowed_hosts = [\"a.example\", \".b.example:80\"]\n\
                cors_origins = [\"http://c.example\"]";
    let (_folder, path) = settings_file(text);
    let of = |arguments: &[&str]| parts(arguments).http.unwrap().origins;
    assert_eq!(of(&[]), OriginPolicy::default());
    assert_eq!(
        of(&["--config", &path]),
        origins(&["a.example", ".b.example:80"], &["http://c.example"])
    );
    let flags = [
        "--allowed-hosts",
        "d,e",
        "--allowed-hosts",
        "*",
        "--config",
        &path,
    ];
    assert_eq!(of(&flags), origins(&["d", "e", "*"], &["http://c.example"]));
    let error = error_of(&["--cors-origins", "http://a,b"]);
    assert!(error.contains("'b' must be an origin"), "{error}");
    let error = error_of(&["--allowed-hosts", "http://a"]);
    assert!(error.contains("'http://a' must be a host name"), "{error}");
}

#[test]
fn one_file_serves_every_command() {
    let (_folder, path) = settings_file("engine = [\"http://a:1\"]\nslots = 3");
    let Source::Remote(engines) = parts(&["gateway", "--config", &path]).source else {
        panic!("the source is a local engine")
    };
    assert_eq!(engines, ["http://a:1"]);
    assert_eq!(engine(&parts(&["--config", &path])).models[0].slots, 3);
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
        (
            "runner = \"magic\"",
            "runner: must be llm_test, llama or attached",
        ),
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
        (&["gateway", "--engine", "https://a:1"], "--engine"),
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
fn a_public_address_needs_insecure() {
    for (setting, address) in [("--http-listen", "0.0.0.0:0"), ("--grpc-listen", "[::]:0")] {
        let error = error_of(&["serve", setting, address]);
        assert!(
            error.contains(setting) && error.contains("--insecure"),
            "{error}"
        );
        parts(&["serve", setting, address, "--insecure"]);
    }
}

#[test]
fn each_model_table_has_its_own_settings() {
    let text = "queue_depth = 5\nslow_reader_timeout = 2\n\
                [[model]]\nname = \"a\"\nworkers = 2\nslots = 3\nqueue_depth = 0\n\
                [[model]]\nname = \"b\"\naliases = [\"bee\", \"c\"]\nslow_reader_timeout = 0.5";
    let (_folder, path) = settings_file(text);
    let (a, b) = match &engine(&parts(&["--config", &path])).models[..] {
        [a, b] => (a.clone(), b.clone()),
        models => panic!("{} models", models.len()),
    };
    assert_eq!((a.name.as_str(), a.workers, a.slots), ("a", 2, 3));
    assert_eq!(
        (a.queue_depth, a.slow_reader_timeout.as_millis()),
        (0, 2_000)
    );
    // The alias of the reference system's performance test.
    assert_eq!(a.aliases, ["test"]);
    assert_eq!((b.name.as_str(), b.workers, b.slots), ("b", 1, 1_024));
    assert_eq!((b.queue_depth, b.slow_reader_timeout.as_millis()), (5, 500));
    assert_eq!(b.aliases, ["bee", "c"]);
    let flag = parts(&["engine", "--config", &path, "--queue-depth", "7"]);
    let depths: Vec<_> = engine(&flag).models.iter().map(|m| m.queue_depth).collect();
    assert_eq!(depths, [0, 7], "a model table overrides the flag");
}

#[test]
fn a_single_model_table_needs_no_name() {
    let (_folder, path) = settings_file("[[model]]\naliases = [\"chat\"]");
    let parts = parts(&["--config", &path]);
    let model = &engine(&parts).models[0];
    assert_eq!(
        (&*model.name, &model.aliases[..]),
        ("llm_test", &["chat".to_owned(), "test".to_owned()][..])
    );
}

#[test]
fn a_gateway_takes_a_file_with_models_and_checks_their_keys() {
    let arguments = |path| ["gateway", "--engine", "http://a:1", "--config", path];
    let (_folder, path) = settings_file("[[model]]\nname = \"a\"");
    parts(&arguments(&path));
    let (_folder, path) = settings_file("[[model]]\nslotz = 1");
    assert!(error_of(&arguments(&path)).contains("'model[1].slotz'"));
}

#[test]
fn errors_in_a_model_table_name_the_key() {
    let long = "a".repeat(257);
    let name = format!("[[model]]\nname = \"{long}\"");
    let alias = format!("[[model]]\naliases = [\"{long}\"]");
    let a = "[[model]]\nname = \"a\"\n";
    let same = |second: &str| format!("{a}aliases = [\"x\", \"y\"]\n[[model]]\n{second}");
    for (text, expected) in [
        (
            format!("{a}[[model]]\nslotz = 3"),
            "the key 'model[2].slotz' is unknown; known keys of a model are aliases, context_length, ",
        ),
        (
            format!("{a}http_listen = \"unix:/a\""),
            "'model[1].http_listen' is unknown",
        ),
        (
            format!("{a}model_name = \"b\""),
            "'model[1].model_name' is unknown",
        ),
        (
            format!("{a}slots = 0"),
            "model[1].slots: must be at least 1 (got 0)",
        ),
        (
            format!("{a}aliases = \"b\""),
            "model[1].aliases: invalid type: string \"b\", expected a list",
        ),
        (
            format!("{a}test_runner_frequency_ms = true"),
            "model[1].test_runner_frequency_ms: invalid type: boolean `true`, expected a number",
        ),
        (
            format!("{a}threads = 2"),
            "model[1].threads is for the runner llama only (the runner is llm_test)",
        ),
        (
            format!("{a}[[model]]\nslots = 1"),
            "model[2].name is missing",
        ),
        (
            "[[model]]\nname = \"\"".to_owned(),
            "model[1].name must not be empty",
        ),
        (name, "model[1].name must be at most 256 bytes"),
        (
            format!("{a}aliases = [\"\"]"),
            "model[1].aliases must not be empty",
        ),
        (alias, "model[1].aliases must be at most 256 bytes"),
        (
            same("name = \"a\""),
            "model[1].name and model[2].name are both 'a'",
        ),
        (
            same("name = \"y\""),
            "model[1].aliases[2] and model[2].name are both 'y'",
        ),
        (
            same("name = \"b\"\naliases = [\"a\"]"),
            "model[1].name and model[2].aliases[1] are both 'a'",
        ),
        (
            format!("{a}aliases = [\"a\"]"),
            "model[1].name and model[1].aliases[1] are both 'a'",
        ),
        (
            "[model]\nname = \"a\"".to_owned(),
            "a table under [[model]]",
        ),
        ("model = []".to_owned(), "a table under [[model]]"),
        ("model = [\"a\"]".to_owned(), "a table under [[model]]"),
    ] {
        let (_folder, path) = settings_file(&text);
        let error = error_of(&["serve", "--config", &path]);
        assert!(
            error.contains(expected) && error.contains(&path),
            "{text}: {error}"
        );
    }
}

#[test]
fn single_model_settings_are_rejected_beside_model_tables() {
    let table = "[[model]]\nname = \"a\"";
    for key in ["slots = 1", "model_name = \"b\"", "test_runner_fail_at = 1"] {
        let (_folder, path) = settings_file(&format!("{key}\n{table}"));
        let (key, _) = key.split_once(' ').expect("the line has a key and a value");
        let error = error_of(&["--config", &path]);
        let said = format!("{key} cannot be set beside [[model]] tables");
        assert!(error.contains(&said), "{error}");
    }
    let (_folder, path) = settings_file(table);
    for [flag, value] in [
        ["--runner", "llm_test"],
        ["--model-path", "a.gguf"],
        ["--model-name", "b"],
        ["--context-length", "8"],
        ["--threads", "1"],
        ["--workers", "1"],
        ["--slots", "1"],
        ["--test-runner-frequency-ms", "1"],
        ["--test-runner-panic-at", "1"],
    ] {
        for command in [&["--config", &path][..], &["engine", "--config", &path]] {
            let error = error_of(&[command, &[flag, value]].concat());
            let expected = format!("{flag} cannot be set beside [[model]] tables");
            assert!(error.contains(&expected), "{error}");
        }
    }
}

#[test]
fn worker_processes_run_this_program_with_the_same_settings() {
    let parts = parts(&[
        "--isolation",
        "process",
        "--workers",
        "3",
        "--slots",
        "5",
        "--test-runner-frequency-ms",
        "2.5",
        "--model-name",
        "m",
    ]);
    let model = &engine(&parts).models[0];
    let Isolation::Process(program) = &model.isolation else {
        panic!("the workers are threads");
    };
    let arguments = [
        "worker",
        "--model",
        "m",
        "--runner",
        "llm_test",
        "--slots",
        "5",
        "--test-runner-frequency-ms",
        "2.5",
    ];
    assert_eq!(program.arguments, arguments.map(OsString::from));
    assert_eq!(model.workers, 3);
    let mut as_worker = arguments.to_vec();
    as_worker.extend(["--engine", "unix:/workers.sock", "--device", "1"]);
    let Ok(Task::Work(worker)) = read_line(&as_worker) else {
        panic!("the command is not a worker");
    };
    assert_eq!((worker.parts.slots, &*worker.parts.model), (5, "m"));
}

#[test]
fn worker_timeouts_and_resumptions_can_be_set() {
    let workers = engine(&parts(&[])).workers.clone();
    assert_eq!(workers.timeouts.heartbeat_timeout, Duration::from_secs(2));
    assert_eq!(workers.timeouts.step_limit, Some(Duration::from_secs(30)));
    assert_eq!(workers.resumption.max_consecutive, 2);
    assert_eq!(
        workers.resumption.acceptance_timeout,
        Duration::from_secs(60)
    );
    let arguments = [
        "--heartbeat-timeout",
        "0.5",
        "--step-limit",
        "0",
        "--max-resumptions",
        "7",
        "--resume-timeout",
        "3",
    ];
    let workers = engine(&parts(&arguments)).workers.clone();
    assert_eq!(
        workers.timeouts.heartbeat_timeout,
        Duration::from_millis(500)
    );
    assert_eq!(workers.timeouts.step_limit, None);
    assert_eq!(workers.resumption.max_consecutive, 7);
    assert_eq!(
        workers.resumption.acceptance_timeout,
        Duration::from_secs(3)
    );
}

#[test]
fn an_attached_model_needs_a_name_and_a_worker_socket_and_takes_no_local_workers() {
    let attached = ["--runner", "attached", "--model-name", "m"];
    let listen = ["--worker-listen", "unix:/workers.sock"];
    let parts = parts(&[&attached[..], &listen].concat());
    assert_eq!(engine(&parts).models[0].workers, 0);
    for (arguments, expected) in [
        (&[&attached[..]].concat(), "--worker-listen"),
        (&[&attached[..2], &listen].concat(), "--model-name"),
        (
            &[&attached[..], &listen, &["--slots", "3"]].concat(),
            "--slots",
        ),
        (
            &[&attached[..], &listen, &["--workers", "3"]].concat(),
            "--workers",
        ),
        (
            &[&attached[..], &["--worker-listen", "127.0.0.1:1"]].concat(),
            "worker connections over TCP require mutual TLS",
        ),
        (
            &["--heartbeat-timeout", "0.01"].to_vec(),
            "--heartbeat-timeout",
        ),
        (
            &["worker", "--engine", "unix:/a", "--runner", "attached"].to_vec(),
            "--runner attached",
        ),
        (&["worker", "--engine", "nowhere"].to_vec(), "--engine"),
        (
            &["worker", "--engine", "a:1", "--worker-tls-ca", "/a"].to_vec(),
            "set all of --worker-tls-ca",
        ),
    ] {
        let error = error_of(arguments);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn connection_timeouts_can_be_set_but_not_disabled() {
    let default = parts(&[]).limits;
    let seconds = Duration::from_secs;
    assert_eq!(default.keep_alive_timeout, seconds(75));
    assert_eq!(default.header_timeout, seconds(10));
    assert_eq!(
        (default.body_timeout, default.write_timeout),
        (seconds(30), seconds(30))
    );
    let (_folder, path) = settings_file("keep_alive_timeout = 3700\nbody_timeout = 5");
    let common = [
        "--config",
        &path,
        "--header-timeout",
        "2",
        "--write-timeout",
        "40",
    ];
    for command in ["serve", "engine", "gateway"] {
        let mut arguments = vec![command];
        arguments.extend(common);
        if command == "gateway" {
            arguments.extend(["--engine", "http://a:1"]);
        }
        let limits = parts(&arguments).limits;
        assert_eq!(limits.keep_alive_timeout, seconds(3_700));
        assert_eq!(limits.header_timeout, seconds(2));
        assert_eq!(
            (limits.body_timeout, limits.write_timeout),
            (seconds(5), seconds(40))
        );
    }
    for setting in ["keep-alive", "header", "body", "write"] {
        let flag = format!("--{setting}-timeout");
        let expected = format!("{flag} must be above 0 seconds (got 0)");
        let error = error_of(&["serve", &flag, "0"]);
        assert!(error.contains(&expected), "{error}");
    }
}
