//! Output, files and exit codes of `tokenway-perf overhead`, in short runs with few streams. The tests do not judge
//! the figures.

use std::fs;

use support::{
    RunOutput, assert_self_contained, path_text, perf_command, read_json, run, split_words,
};

mod support;

/// Runs one round of these paths with two streams.
fn run_overhead(paths: &str, arguments: &[&str]) -> RunOutput {
    let mut command = perf_command(split_words(
        "overhead --quick --rounds 1 --streams 2 --paths",
    ));
    command.arg(paths).args(arguments);
    run(command)
}

#[test]
fn every_path_is_measured_under_every_load_and_no_token_is_lost() {
    let paths = "mpsc,raw-tcp,bare-tonic,bare-axum,grpc,ndjson,sse,two-tcp,two-unix";
    let folder = tempfile::tempdir().expect("a folder");
    let [json, html] = ["run.json", "run.html"].map(|name| folder.path().join(name));
    let ran = run_overhead(
        paths,
        &["--json", path_text(&json), "--html", path_text(&html)],
    );
    ran.assert_succeeded();
    let run = read_json(&json);
    let cells = run["cells"].as_array().expect("cells");
    for load in [
        "2 streams × 50 tokens/s",
        "2 streams, full speed",
        "requests of 16 tokens, 32 at a time",
        "requests of 16 tokens, 1,000 a second",
    ] {
        assert!(ran.out.contains(load), "{ran}");
        for path in paths.split(',') {
            let mut cells = cells.iter();
            let cell = cells.find(|cell| cell["path"] == path && cell["load"] == load);
            let round = &cell.expect("a cell for each path")["rounds"][0];
            assert!(round["tokens"].as_u64() > Some(0), "{round}");
        }
    }
    assert_self_contained(&fs::read_to_string(html).expect("a page"));
}

#[test]
fn keys_and_tls_are_measured_on_both_apis_beside_the_same_api_without_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    let paths = "ndjson,grpc,keys-ndjson,keys-grpc,tls-ndjson,tls-grpc";
    let loads = ["--loads", "open-loop", "--json", path_text(&json)];
    let ran = run_overhead(paths, &loads);
    ran.assert_succeeded();
    let run = read_json(&json);
    let cells = run["cells"].as_array().expect("cells");
    assert_eq!(cells.len(), 6);
    for cell in cells {
        let tokens = cell["rounds"][0]["tokens"].as_u64();
        assert!(tokens > Some(0), "{cell}");
    }
    for on in ["keys", "keys and TLS"] {
        for api in ["HTTP", "gRPC"] {
            let target = format!("{api}, {on}: TTFT added at p50, 1,000 requests/s");
            assert!(ran.out.contains(&target), "{target}: {ran}");
        }
    }
}

#[test]
fn the_targets_are_listed_with_value_limit_and_verdict() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    let ran = run_overhead("bare-axum,ndjson", &["--json", path_text(&json)]);
    ran.assert_succeeded();
    // With two streams only the short requests have targets.
    let run = read_json(&json);
    let targets = run["targets"].as_array().expect("targets");
    assert!(!targets.is_empty());
    for target in targets {
        let number = |name: &str| target[name].as_f64().expect("a number");
        let is_reached = match target["bound"].as_str() {
            Some("at_least") => number("value") >= number("limit"),
            Some("at_most") => number("value") <= number("limit"),
            other => panic!("{other:?} is no bound"),
        };
        assert_eq!(target["pass"], is_reached, "{target}");
    }
    let is_missed = targets.iter().any(|target| target["pass"] == false);
    assert_eq!(ran.out.contains("FAIL"), is_missed, "{ran}");
    // A floor alone has no target, so it can neither miss one nor be worse than the baseline.
    run_overhead("bare-axum", &["--check", "--baseline", path_text(&json)]).assert_succeeded();
}

#[test]
fn many_streams_are_open_at_once_and_their_memory_is_measured() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    run_overhead("grpc", &["--loads", "scale", "--json", path_text(&json)]).assert_succeeded();
    let run = read_json(&json);
    let cells = run["cells"].as_array().expect("cells").iter();
    let measured: Vec<_> = cells
        .map(|cell| {
            let round = &cell["rounds"][0];
            assert!(round["rss_per_stream"].is_number(), "{round}");
            assert_eq!(round["faults"], 0);
            cell["load"].as_str().expect("a load")
        })
        .collect();
    let expected = [
        "50 streams × 20 tokens/s",
        "5 streams × 200 tokens/s",
        "100 streams × 1 token in 2 s",
        "40 queued requests",
    ];
    assert_eq!(measured, expected);
    // The targets are for thousands of streams, not for dozens.
    assert_eq!(run["targets"].as_array().map(Vec::len), Some(0));
}

#[test]
fn the_headline_chart_is_refused_at_once_without_its_64_paced_streams() {
    let folder = tempfile::tempdir().expect("a folder");
    let picture = folder.path().join("run.svg");
    let picture_of = ["--loads", "paced", "--picture", path_text(&picture)];
    let refused = run_overhead("bare-axum,ndjson", &picture_of);
    assert_eq!(refused.code, Some(1), "{refused}");
    let reason = "--picture shows 64 streams";
    assert!(refused.err.contains(reason), "{refused}");
    assert!(refused.out.is_empty() && !picture.exists());
    let paths = "overhead --quick --rounds 1 --paths bare-axum,ndjson";
    let mut command = perf_command(split_words(paths));
    command.args(["--streams", "64"]).args(picture_of);
    run(command).assert_succeeded();
    let svg = fs::read_to_string(picture).expect("a chart");
    assert!(svg.starts_with("<svg"), "{svg}");
    assert!(svg.contains("HTTP NDJSON"), "{svg}");
}

#[test]
fn a_wrong_baseline_is_refused_before_anything_is_measured() {
    let ran = run_overhead("bare-axum", &["--baseline", "/nowhere.json"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran}");
    assert!(ran.err.contains("--baseline /nowhere.json"), "{ran}");
}
