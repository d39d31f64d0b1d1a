//! What `tokenway-perf overhead` prints, writes and exits with: a short run over servers of its own.
//! What its figures are worth is not for a test to say.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// One round of a few lanes with few streams, and these arguments besides.
fn overhead(lanes: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tokenway-perf"))
        .args(["overhead", "--quick", "--rounds", "1", "--streams", "2"])
        .args(["--lanes", lanes])
        .args(arguments)
        .output()
        .expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("it prints text")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path of ASCII")
}

#[test]
fn every_lane_is_measured_under_every_load_and_no_token_is_lost() {
    let lanes = "mpsc,raw-tcp,bare-tonic,bare-axum,grpc,ndjson,sse,two-tcp,two-unix";
    let folder = tempfile::tempdir().expect("a folder");
    let (json, html) = (
        folder.path().join("run.json"),
        folder.path().join("run.html"),
    );
    let files = ["--json", path(&json), "--html", path(&html)];
    let output = overhead(lanes, &files);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{out}{}", text(&output.stderr));
    let run: Value =
        serde_json::from_str(&fs::read_to_string(json).expect("a file")).expect("JSON");
    let cells = run["cells"].as_array().expect("cells");
    for load in [
        "2 streams × 50 tokens/s",
        "2 streams, full speed",
        "requests of 16 tokens, 32 at a time",
        "requests of 16 tokens, 1,000 a second",
    ] {
        assert!(out.contains(load), "{out}");
        for lane in lanes.split(',') {
            let cell = cells.iter().find(|cell| {
                cell["lane"] == lane && cell["load"].as_str().is_some_and(|of| of.starts_with(load))
            });
            let round = &cell.expect("a cell for each")["rounds"][0];
            assert!(
                round["tokens"].as_u64().is_some_and(|tokens| tokens > 0),
                "{round}"
            );
        }
    }
    let page = fs::read_to_string(html).expect("a page");
    for foreign in ["src=", "href=", "@import", "url("] {
        assert!(!page.contains(foreign), "the page needs {foreign}");
    }
}

#[test]
fn the_targets_are_listed_with_value_limit_and_verdict() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    let output = overhead("bare-axum,ndjson", &["--json", path(&json)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let run: Value =
        serde_json::from_str(&fs::read_to_string(&json).expect("a file")).expect("JSON");
    // Of two streams only the short requests are a target's.
    let targets = run["targets"].as_array().expect("targets");
    assert!(!targets.is_empty());
    for target in targets {
        let number = |name: &str| target[name].as_f64().expect("a number");
        let reached = match target["bound"].as_str() {
            Some("at_least") => number("value") >= number("limit"),
            Some("at_most") => number("value") <= number("limit"),
            other => panic!("{other:?} is no bound"),
        };
        assert_eq!(target["pass"], reached, "{target}");
    }
    let missed = targets.iter().any(|target| target["pass"] == false);
    // A run is no worse than itself, but for what a second run is by chance: so ask for nothing new.
    let checked = overhead("bare-axum", &["--check", "--baseline", path(&json)]);
    assert!(
        checked.status.success(),
        "no target can be missed without its lane"
    );
    assert!(text(&output.stdout).contains("FAIL") == missed);
}

#[test]
fn streams_that_are_many_are_open_all_at_once_and_their_memory_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    let output = overhead("grpc", &["--loads", "scale", "--json", path(&json)]);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{out}{}", text(&output.stderr));
    let run: Value =
        serde_json::from_str(&fs::read_to_string(&json).expect("a file")).expect("JSON");
    let measured: Vec<_> = run["cells"]
        .as_array()
        .expect("cells")
        .iter()
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
    // What is to hold of thousands is not judged by dozens.
    assert_eq!(run["targets"].as_array().map(Vec::len), Some(0));
}

#[test]
fn the_headline_picture_is_of_64_paced_streams_and_is_refused_at_once_without_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let picture = folder.path().join("run.svg");
    let arguments = ["--loads", "paced", "--picture", path(&picture)];
    let refused = overhead("bare-axum,ndjson", &arguments);
    assert_eq!(refused.status.code(), Some(1));
    let err = text(&refused.stderr);
    assert!(err.contains("--picture shows 64 streams"), "{err}");
    assert!(refused.stdout.is_empty() && !picture.exists());
    let drawn = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"))
        .args(["overhead", "--quick", "--rounds", "1", "--streams", "64"])
        .args(["--lanes", "bare-axum,ndjson"])
        .args(arguments)
        .output()
        .expect("the program runs");
    assert!(drawn.status.success(), "{}", text(&drawn.stderr));
    let svg = fs::read_to_string(picture).expect("a picture");
    assert!(
        svg.starts_with("<svg") && svg.contains("HTTP NDJSON"),
        "{svg}"
    );
}

#[test]
fn what_is_no_older_run_is_said_before_anything_is_measured() {
    let output = overhead("bare-axum", &["--baseline", "/nowhere.json"]);
    assert!(!output.status.success());
    let err = text(&output.stderr);
    assert!(err.contains("--baseline /nowhere.json"), "{err}");
    assert!(output.stdout.is_empty());
}
