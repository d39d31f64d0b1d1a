//! `tokenway-perf peers` without the other gateways, which are not installed for tests.

use support::{perf_command, run, split_words};

mod support;

#[test]
fn the_gateway_is_compared_with_the_engine_alone() {
    let mut command = perf_command(split_words("peers --rounds 1 --seconds 1"));
    command
        .env_remove("SMG")
        .env_remove("LITELLM")
        .env_remove("ENVOY");
    let ran = run(command);
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
