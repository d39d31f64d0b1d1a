//! Output, files and exit codes of `tokenway-perf soak`, in a short run.

use std::fs;

use support::{assert_self_contained, path_text, perf_command, read_json, run, split_words};

mod support;

#[test]
fn a_short_run_has_every_behavior_and_finds_no_fault_and_no_leak() {
    let folder = tempfile::tempdir().expect("a folder");
    let [json, html] = ["run.json", "run.html"].map(|name| folder.path().join(name));
    // Memory still grows in the first six seconds, so the allowance is large.
    let arguments = "soak --minutes 0.1 --seed 7 --peer-timeout-ms 300 --rss-allowance-mib 200";
    let mut command = perf_command(split_words(arguments));
    command.args(["--json", path_text(&json), "--html", path_text(&html)]);
    let ran = run(command);
    ran.assert_succeeded();
    for text in ["--seed 7", "\nno leak"] {
        assert!(ran.out.contains(text), "{ran}");
    }
    let run = read_json(&json);
    assert_eq!((&run["fault_count"], &run["seed"]), (&0.into(), &7.into()));
    let kinds = run["kinds"].as_array().expect("kinds");
    assert_eq!(kinds.len(), 18);
    for kind in kinds {
        assert!(kind["started"].as_u64() > Some(0), "{kind}");
        let ends = kind["ends"].as_object().expect("ends");
        assert!(ends.keys().any(|end| end != "unfinished"), "{kind}");
    }
    let steady = run["steady"].as_array().expect("samples");
    assert!(steady.len() > 10, "{run}");
    let most = |name: &str| steady.iter().map(|sample| sample[name].as_u64()).max();
    for busy in ["sequences", "connections", "in_flight", "streams_done"] {
        assert!(most(busy).flatten() > Some(0), "{busy}: {run}");
    }
    let page = fs::read_to_string(html).expect("a page");
    assert!(page.contains("<svg"));
    assert_self_contained(&page);
}

#[test]
fn a_server_that_does_not_exist_is_an_error_and_not_a_leak() {
    let apis = "soak --http http://127.0.0.1:9 --grpc 127.0.0.1:9 --minutes 0.01";
    let ran = run(perf_command(split_words(&format!("{apis} --pid 4194304"))));
    assert_eq!(ran.code, Some(1), "{ran}");
    assert!(ran.err.starts_with("error: the server's process"), "{ran}");
    let without_process = run(perf_command(split_words(apis)));
    assert_eq!(without_process.code, Some(2), "{without_process}");
}
