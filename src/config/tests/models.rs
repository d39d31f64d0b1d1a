use super::*;
use crate::models::UnknownModelPolicy;

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
    let by_flag = server_parts(&line);
    assert_eq!(names(&by_flag), [("llm_test", vec!["a", "b", "c", "test"])]);
    let (_folder, path) = settings_file("model_alias = [\"a\"]\nany_model = true");
    let by_file = server_parts(&["--config", &path]);
    assert_eq!(names(&by_file), [("llm_test", vec!["a", "test"])]);
    assert_eq!(engine(&by_file).unknown_model, UnknownModelPolicy::First);
    let both = server_parts(&["--config", &path, "--model-alias", "b", "--any-model=false"]);
    assert_eq!(names(&both), [("llm_test", vec!["b", "test"])]);
    assert_eq!(engine(&both).unknown_model, UnknownModelPolicy::Refuse);
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
    let renamed = server_parts(&["--model-name", "test"]);
    assert_eq!(names(&renamed), [("test", vec![])]);
    let two = "[[model]]\nname = \"a\"\n[[model]]\nname = \"b\"\n";
    let (_folder, path) = settings_file(two);
    let first = server_parts(&["--config", &path]);
    assert_eq!(names(&first), [("a", vec!["test"]), ("b", vec![])]);
    let (_folder, path) = settings_file(&format!("{two}aliases = [\"test\"]"));
    let taken = server_parts(&["--config", &path]);
    assert_eq!(names(&taken), [("a", vec![]), ("b", vec!["test"])]);
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        "unix:/a/b",
    ];
    assert_eq!(names(&server_parts(&attached)), [("m", vec![])]);
}

#[test]
fn each_model_table_has_its_own_settings() {
    let text = "queue_depth = 5\nslow_reader_timeout = 2\n\
                [[model]]\nname = \"a\"\nworkers = 2\nslots = 3\nqueue_depth = 0\n\
                [[model]]\nname = \"b\"\naliases = [\"bee\", \"c\"]\nslow_reader_timeout = 0.5";
    let (_folder, path) = settings_file(text);
    let (a, b) = match &engine(&server_parts(&["--config", &path])).models[..] {
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
    let flag = server_parts(&["engine", "--config", &path, "--queue-depth", "7"]);
    let depths: Vec<_> = engine(&flag).models.iter().map(|m| m.queue_depth).collect();
    assert_eq!(depths, [0, 7], "a model table overrides the flag");
}

#[test]
fn a_single_model_table_needs_no_name() {
    let (_folder, path) = settings_file("[[model]]\naliases = [\"chat\"]");
    let parts = server_parts(&["--config", &path]);
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
    server_parts(&arguments(&path));
    let (_folder, path) = settings_file("[[model]]\nslotz = 1");
    assert!(error_of(&arguments(&path)).contains("'model[1].slotz'"));
}

/// Asserts that `tokenway serve` rejects a settings file with this text, and that the error contains `expected`.
fn assert_rejected(text: &str, expected: &str) {
    let (_folder, path) = settings_file(text);
    let error = error_of(&["serve", "--config", &path]);
    assert!(
        error.contains(expected) && error.contains(&path),
        "{text}: {error}"
    );
}

#[test]
fn errors_in_a_model_table_name_the_key() {
    for (setting, expected) in [
        (
            "[[model]]\nslotz = 3",
            "the key 'model[2].slotz' is unknown; known keys of a model are aliases, cache_type_k, ",
        ),
        (
            "http_listen = \"unix:/a\"",
            "'model[1].http_listen' is unknown",
        ),
        ("model_name = \"b\"", "'model[1].model_name' is unknown"),
        ("slots = 0", "model[1].slots: must be at least 1 (got 0)"),
        (
            "aliases = \"b\"",
            "model[1].aliases: invalid type: string \"b\", expected a list",
        ),
        (
            "test_runner_frequency_ms = true",
            "model[1].test_runner_frequency_ms: invalid type: boolean `true`, expected a number",
        ),
        (
            "threads = 2",
            "model[1].threads is for the runner llama only (the runner is llm_test)",
        ),
        ("[[model]]\nslots = 1", "model[2].name is missing"),
        ("aliases = [\"\"]", "model[1].aliases must not be empty"),
        (
            "aliases = [\"a\"]",
            "model[1].name and model[1].aliases[1] are both 'a'",
        ),
    ] {
        assert_rejected(&format!("[[model]]\nname = \"a\"\n{setting}"), expected);
    }
}

#[test]
fn invalid_names_of_models_are_rejected() {
    let long = "a".repeat(257);
    let name = format!("[[model]]\nname = \"{long}\"");
    let alias = format!("[[model]]\naliases = [\"{long}\"]");
    for (text, expected) in [
        ("[[model]]\nname = \"\"", "model[1].name must not be empty"),
        (&*name, "model[1].name must be at most 256 bytes"),
        (&*alias, "model[1].aliases must be at most 256 bytes"),
        ("[model]\nname = \"a\"", "a table under [[model]]"),
        ("model = []", "a table under [[model]]"),
        ("model = [\"a\"]", "a table under [[model]]"),
    ] {
        assert_rejected(text, expected);
    }
}

#[test]
fn two_models_must_not_share_a_name_or_an_alias() {
    let first = "[[model]]\nname = \"a\"\naliases = [\"x\", \"y\"]";
    for (second, expected) in [
        (
            "name = \"a\"",
            "model[1].name and model[2].name are both 'a'",
        ),
        (
            "name = \"y\"",
            "model[1].aliases[2] and model[2].name are both 'y'",
        ),
        (
            "name = \"b\"\naliases = [\"a\"]",
            "model[1].name and model[2].aliases[1] are both 'a'",
        ),
    ] {
        assert_rejected(&format!("{first}\n[[model]]\n{second}"), expected);
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
