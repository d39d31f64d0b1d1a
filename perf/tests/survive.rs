//! `tokenway-perf survive`, over a few seconds of faults.

use std::process::{Command, Stdio};

/// The number behind these words.
fn number(out: &str, before: &str) -> u64 {
    let rest = out.split(before).nth(1).expect(before);
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().expect(before)
}

#[test]
fn every_stream_is_whole_while_workers_are_killed_and_stopped() {
    // So many workers that one is always up: where there is none, a new request is refused.
    let arguments = "survive --seed 1 --seconds 4 --workers 8 --streams 24 --tokens 200 --interval-ms 5 \
        --least-ms 200 --most-ms 500";
    let output = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"))
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .expect("the program runs");
    let out = String::from_utf8(output.stdout).expect("it prints text");
    assert_eq!(output.status.code(), Some(0), "{out}");
    assert_eq!(number(&out, " tokens; "), 0, "{out}");
    assert!(number(&out, "killed (SIGKILL) ") > 0, "{out}");
    assert!(number(&out, "stopped (SIGSTOP) ") > 0, "{out}");
    assert!(number(&out, "resumptions      ") > 0, "{out}");
    // Each stream was begun, and has come to its end.
    assert!(number(&out, "streams          ") >= 24, "{out}");
}
