use super::*;

/// The output of `tokenway config show <arguments>`.
fn show(arguments: &[&str]) -> String {
    match read_line(&[&["config", "show"], arguments].concat()) {
        Ok(ParsedCommand::Print(text)) => text,
        Ok(_) => panic!("the command is not `config show`"),
        Err(error) => panic!("{arguments:?}: {error}"),
    }
}

/// The line of `tokenway config show <arguments>` about this key, with single spaces.
pub(super) fn shown(arguments: &[&str], key: &str) -> String {
    let text = show(arguments);
    let starts = |line: &&str| line.trim_start_matches("# ").split(' ').next() == Some(key);
    let mut lines = text.lines().filter(starts);
    let line = lines.next().unwrap_or_else(|| panic!("no {key} in {text}"));
    assert_eq!(lines.next(), None, "{text}");
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn each_value_is_shown_with_its_source() {
    let (_folder, path) = settings_file("drain_grace = 0.5\nqueue_depth = 5\nslots = 3");
    let line = ["--config", &path, "--slots", "7", "--allowed-hosts", "a,b"];
    for (key, expected) in [
        ("slots", "slots = 7 # --slots".to_owned()),
        ("drain_grace", format!("drain_grace = 0.5 # {path}:1")),
        ("queue_depth", format!("queue_depth = 5 # {path}:2")),
        ("drain_timeout", "drain_timeout = 30 # default".to_owned()),
        (
            "allowed_hosts",
            "allowed_hosts = [\"a\", \"b\"] # --allowed-hosts".to_owned(),
        ),
        (
            "model_name",
            "model_name = \"llm_test\" # default".to_owned(),
        ),
        ("workers", "workers = 1 # default".to_owned()),
        (
            "test_runner_fail_at",
            "# test_runner_fail_at # default: never".to_owned(),
        ),
    ] {
        assert_eq!(shown(&line, key), expected);
    }
}

#[test]
fn each_model_table_is_shown_with_its_sources() {
    let text =
        "slow_reader_timeout = 3\n[[model]]\nname = \"a\"\nslots = 2\n[[model]]\nname = \"b\"";
    let (_folder, path) = settings_file(text);
    let text = show(&["--config", &path, "--queue-depth", "9"]);
    let tables: Vec<_> = text.split("[[model]]").skip(1).collect();
    assert_eq!(tables.len(), 2);
    for (table, name, slots, slots_source) in [
        (tables[0], "a", "2", format!("{path}:4")),
        (tables[1], "b", "1024", "default".to_owned()),
    ] {
        let words = table.split_whitespace().collect::<Vec<_>>().join(" ");
        for expected in [
            format!("name = \"{name}\" # {path}:"),
            format!("slots = {slots} # {slots_source}"),
            "queue_depth = 9 # --queue-depth".to_owned(),
            format!("slow_reader_timeout = 3 # {path}:1"),
        ] {
            assert!(words.contains(&expected), "{expected}: {words}");
        }
    }
}

/// The values that `tokenway config show` shows.
fn values(text: &str) -> toml::Table {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn the_output_is_a_settings_file_with_the_same_values() {
    let everything = [
        "--http-listen",
        "unix:/a",
        "--unknown-fields",
        "ignore",
        "--stream-format",
        "sse",
        "--headers-after",
        "0.25",
        "--allowed-hosts",
        ".A.example:80,*",
        "--cors-origins",
        "http://c.example",
        "--isolation",
        "process",
        "--test-runner-frequency-ms",
        "0.5",
        "--any-model",
        "--insecure",
        "--max-resumptions",
        "7",
        "--model-alias",
        "x,y",
    ];
    let (_folder, tables) =
        settings_file("[[model]]\nname = \"a\"\n[[model]]\nname = \"b\"\nslots = 2");
    let attached = [
        "--runner",
        "attached",
        "--model-name",
        "m",
        "--worker-listen",
        "unix:/w",
    ];
    for arguments in [&[][..], &everything, &["--config", &tables], &attached] {
        let first = show(arguments);
        let (_folder, path) = settings_file(&first);
        let second = show(&["--config", &path]);
        assert_eq!(values(&first), values(&second));
    }
}
