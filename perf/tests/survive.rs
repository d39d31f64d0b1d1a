//! `tokenway-perf survive` with a few seconds of faults. It runs the executable `tokenway` from its own folder, which
//! `cargo nextest run` builds for the whole workspace.

use support::{perf_command, run, split_words};

mod support;

/// Returns the number that follows `before` in the output.
fn number_after(out: &str, before: &str) -> u64 {
    let rest = out.split(before).nth(1).expect(before);
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().expect(before)
}

#[test]
fn every_stream_is_whole_while_workers_are_killed_and_stopped() {
    // With this many workers, one is always ready. Without a ready worker, a new request would be rejected.
    let arguments = "survive --seed 1 --seconds 4 --workers 8 --streams 24 --tokens 200 --interval-ms 5 \
                     --least-ms 200 --most-ms 500";
    let ran = run(perf_command(split_words(arguments)));
    assert_eq!(ran.code, Some(0), "{ran}");
    let out = &ran.out;
    assert_eq!(number_after(out, " tokens; "), 0, "{out}");
    assert!(number_after(out, "killed (SIGKILL) ") > 0, "{out}");
    assert!(number_after(out, "stopped (SIGSTOP) ") > 0, "{out}");
    assert!(number_after(out, "resumptions      ") > 0, "{out}");
    // Each stream has started and ended.
    assert!(number_after(out, "streams          ") >= 24, "{out}");
}

#[test]
fn every_stream_is_whole_behind_a_gateway_whose_engines_fail() {
    let arguments =
        "survive --upstreams --seed 1 --seconds 4 --streams 32 --tokens 120 --interval-ms 5";
    let ran = run(perf_command(split_words(arguments)));
    assert_eq!(ran.code, Some(0), "{ran}");
    let out = &ran.out;
    assert!(
        out.contains("lost 0, repeated 0, wrong 0; 0 faults"),
        "{out}"
    );
    assert!(number_after(out, "seed 1: ") >= 32, "{out}");
    assert!(number_after(out, "whole streams and ") > 0, "{out}");
    assert!(number_after(out, "; 0 faults; ") > 0, "{out}");
    for method in ["text", "token_ids", "replay"] {
        assert!(number_after(out, &format!("{method} ")) > 0, "{out}");
    }
}
