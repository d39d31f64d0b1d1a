//! `tokenway-perf survive`, over a few seconds of faults. It runs the server `tokenway` from its own folder,
//! which `cargo nextest run` of the workspace builds.

use support::{program, run, words};

mod support;

/// Number behind these words.
fn number(out: &str, before: &str) -> u64 {
    let rest = out.split(before).nth(1).expect(before);
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().expect(before)
}

#[test]
fn every_stream_is_whole_while_workers_are_killed_and_stopped() {
    // So many workers that one is always ready: without any, a new request is refused.
    let arguments = "survive --seed 1 --seconds 4 --workers 8 --streams 24 --tokens 200 --interval-ms 5 \
                     --least-ms 200 --most-ms 500";
    let ran = run(program(words(arguments)));
    assert_eq!(ran.code, Some(0), "{ran}");
    let out = &ran.out;
    assert_eq!(number(out, " tokens; "), 0, "{out}");
    assert!(number(out, "killed (SIGKILL) ") > 0, "{out}");
    assert!(number(out, "stopped (SIGSTOP) ") > 0, "{out}");
    assert!(number(out, "resumptions      ") > 0, "{out}");
    // Each stream has started and ended.
    assert!(number(out, "streams          ") >= 24, "{out}");
}
