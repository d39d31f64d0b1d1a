//! `tokenway-perf peers`. The other gateways are not installed for tests.

use std::process::Command;

use support::{path_text, perf_command, run, split_words, write_program};

mod support;

/// Returns the command `peers` with a short load and none of the other gateways.
fn peers() -> Command {
    let mut command = perf_command(split_words("peers --rounds 1 --seconds 1"));
    for program in ["SMG", "LITELLM", "ENVOY"] {
        command.env_remove(program);
    }
    command
}

#[test]
fn the_gateway_is_compared_with_the_engine_alone() {
    let ran = run(peers());
    assert_eq!(ran.code, Some(0), "{ran}");
    let rows = [
        "| engine alone |",
        "| Tokenway |",
        "tokenized, of engine alone |",
    ];
    for row in rows {
        let line = ran.out.lines().find(|line| line.contains(row)).expect(row);
        assert!(!line.contains('–'), "a figure is missing: {line}");
    }
}

#[test]
fn a_gateway_that_exits_at_once_is_named_with_its_last_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let smg = folder.path().join("smg");
    let smg = path_text(&smg);
    write_program(smg, "echo no such engine >&2\nexit 3\n");
    let mut command = peers();
    command.args(["--smg", smg]);
    run(command).assert_failed(&format!("{smg} ended with exit status: 3:\nno such engine"));
}
