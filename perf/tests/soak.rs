//! What `tokenway-perf soak` prints, writes and exits with: a short run over a server of its own.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A run with these arguments.
fn soak(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tokenway-perf"))
        .arg("soak")
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
fn a_short_run_does_everything_and_finds_no_fault_and_no_leak() {
    let folder = tempfile::tempdir().expect("a folder");
    let (json, html) = (
        folder.path().join("run.json"),
        folder.path().join("run.html"),
    );
    // Six seconds are too few for an allocator to have learnt how much is needed.
    let output = soak(&[
        "--minutes",
        "0.1",
        "--seed",
        "7",
        "--patience-ms",
        "300",
        "--rss-allowance-mib",
        "200",
        "--json",
        path(&json),
        "--html",
        path(&html),
    ]);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{out}{}", text(&output.stderr));
    assert!(
        out.contains("--seed 7") && out.contains("\nno leak"),
        "{out}"
    );
    let run: Value =
        serde_json::from_str(&fs::read_to_string(json).expect("a file")).expect("JSON");
    assert_eq!((&run["fault_count"], &run["seed"]), (&0.into(), &7.into()));
    for kind in run["kinds"].as_array().expect("kinds") {
        let ends = kind["ends"].as_object().expect("ends");
        assert!(ends.keys().any(|end| end != "unfinished"), "{kind}");
    }
    let steady = run["steady"].as_array().expect("looks");
    assert!(steady.len() > 10, "{run}");
    let most = |name: &str| steady.iter().filter_map(|look| look[name].as_u64()).max();
    for busy in ["sequences", "connections", "in_flight", "streams_done"] {
        assert!(most(busy) > Some(0), "{busy}: {run}");
    }
    let page = fs::read_to_string(html).expect("a page");
    assert!(page.contains("<svg"));
    for foreign in ["src=", "href=", "@import", "url("] {
        assert!(!page.contains(foreign), "the page needs {foreign}");
    }
}

#[test]
fn a_server_that_is_none_is_an_error_and_no_leak() {
    let doors = [
        "--http",
        "http://127.0.0.1:9",
        "--grpc",
        "127.0.0.1:9",
        "--minutes",
        "0.01",
    ];
    let output = soak(&[&doors[..], &["--pid", "4194304"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let err = text(&output.stderr);
    assert!(err.starts_with("error: the server's process"), "{err}");
    let output = soak(&doors);
    assert_eq!(output.status.code(), Some(2), "without its process");
}
