//! `--help`, `config check`, `config show`, and errors about settings on the command line.

mod support;

use support::program::tokenway;

#[tokio::test]
async fn gateway_help_names_required_settings_and_explains_insecure() {
    let help = tokenway()
        .args(["gateway", "--help"])
        .run()
        .await
        .expect_success();
    for expected in [
        "Usage: tokenway gateway --engine <ADDRESS> [OPTIONS]",
        "Required, here or in the settings file",
        "listening without API keys",
    ] {
        assert!(help.contains(expected), "{help}");
    }
}

#[tokio::test]
async fn an_invalid_value_is_reported_with_its_flag_or_variable() {
    let foo = || tokenway().env("MODEL_RUNNER", "foo");
    for (program, named) in [
        (foo(), "'MODEL_RUNNER'\n  [possible values: llm_test, llama"),
        (foo().arg("engine"), "'MODEL_RUNNER'"),
        (foo().args(["--runner", "bar"]), "'--runner <RUNNER>'"),
        (
            tokenway().env("TOKENWAY_WORKER_ENGINE", "a").arg("worker"),
            "'TOKENWAY_WORKER_ENGINE'",
        ),
        (foo().arg("--runner=bar"), "'--runner <RUNNER>'"),
        (
            tokenway().env("TOKENWAY_ENGINE", "a:1").arg("gateway"),
            "'TOKENWAY_ENGINE'",
        ),
    ] {
        let outcome = program.run().await;
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(outcome.stderr.contains(named), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_combination_that_is_invalid_is_reported_with_its_variable() {
    for (variable, value, expected) in [
        (
            "TOKENWAY_THREADS",
            "2",
            "TOKENWAY_THREADS is for the runner llama only",
        ),
        (
            "TOKENWAY_HTTP_LISTEN",
            "0.0.0.0:0",
            "TOKENWAY_HTTP_LISTEN 0.0.0.0:0 can be reached",
        ),
        (
            "TOKENWAY_MODEL_NAME",
            "",
            "TOKENWAY_MODEL_NAME must not be empty",
        ),
    ] {
        let outcome = tokenway().env(variable, value).run().await;
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
        assert!(outcome.stderr.contains(expected), "{outcome:?}");
    }
}

#[tokio::test]
async fn help_groups_the_settings_under_headings() {
    for (command, headings) in [
        (
            "serve",
            &[
                "Options",
                "Model",
                "Workers",
                "Test runner",
                "Queue and limits",
                "API keys",
                "TLS",
                "Admin listener",
                "Remote workers",
                "TLS of worker connections",
                "HTTP API",
                "gRPC API",
                "Connections",
                "Shutdown",
                "Log",
            ][..],
        ),
        (
            "gateway",
            &[
                "Options",
                "Engines",
                "HTTP API",
                "gRPC API",
                "Queue and limits",
                "API keys",
                "TLS",
                "Admin listener",
                "TLS of engines",
                "Connections",
                "Shutdown",
                "Log",
            ],
        ),
        (
            "worker",
            &[
                "Options",
                "Engine",
                "Model",
                "Workers",
                "Test runner",
                "TLS of worker connections",
                "Log",
            ],
        ),
    ] {
        let help = tokenway()
            .args([command, "--help"])
            .run()
            .await
            .expect_success();
        let lines = help.lines().filter(|line| !line.starts_with([' ', '-']));
        let found: Vec<_> = lines.filter_map(|line| line.strip_suffix(':')).collect();
        for heading in headings {
            assert!(found.contains(heading), "{heading}: {help}");
        }
        assert_eq!(found.len(), headings.len(), "{found:?}");
    }
}

#[tokio::test]
async fn config_check_prints_every_problem_and_exits_with_2() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tokenway.toml");
    std::fs::write(&path, "slots = 0\nslotz = 1\n").expect("a file");
    let check = || tokenway().args(["config", "check"]).arg(&path);
    let outcome = check().run().await;
    let path = path.display();
    assert_eq!(
        (outcome.code, &*outcome.stdout),
        (Some(2), ""),
        "{outcome:?}"
    );
    let invalid = format!("{path}:1:1: slots: must be at least 1 (got 0)\n");
    let unknown = format!("{path}:2:1: the key 'slotz' is unknown");
    let rest = outcome.stderr.strip_prefix(&invalid);
    assert!(
        rest.is_some_and(|rest| rest.starts_with(&unknown)),
        "{outcome:?}"
    );
    std::fs::write(path.to_string(), "slots = 1\n").expect("a file");
    // Environment variables do not belong to the file, so `config check` ignores them.
    let outcome = check().env("TOKENWAY_SLOTS", "none").run().await;
    assert_eq!(outcome.expect_success(), format!("{path} is valid\n"));
}

#[tokio::test]
async fn config_show_names_the_variable_that_set_a_value() {
    let show = tokenway().args(["config", "show", "--drain-grace", "0"]);
    let shown = show.env("TOKENWAY_SLOTS", "3").run().await.expect_success();
    let line = |key| shown.lines().find(|line| line.starts_with(key));
    let expected = "slots = 3 # environment variable TOKENWAY_SLOTS";
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        line("slots").map(words).as_deref(),
        Some(expected),
        "{shown}"
    );
    let expected = "drain_grace = 0 # --drain-grace";
    assert_eq!(
        line("drain_grace").map(words).as_deref(),
        Some(expected),
        "{shown}"
    );
}
