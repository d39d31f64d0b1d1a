//! `tokenway-perf attack` with attacks of a second. It runs the executable `tokenway` from its own folder, which
//! `cargo nextest run` builds for the whole workspace. The tests do not judge the server.

use support::{path_text, perf_command, read_json, run, split_words};

mod support;

#[test]
fn each_attack_is_a_row_with_the_gaps_the_memory_and_the_processor_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("run.json");
    let mut command = perf_command(split_words(
        "attack --seconds 1 --only busy-core,pings --json",
    ));
    command.arg(path_text(&json));
    let ran = run(command);
    assert_eq!(ran.code, Some(0), "{ran}");
    let run = read_json(&json);
    let rows = run["rows"].as_array().expect("rows");
    for (row, name) in rows.iter().zip(["busy-core", "pings"]) {
        assert_eq!(row["attack"], name);
        assert!(ran.out.contains(&format!("\n{name} ")), "{ran}");
        for api in ["http", "grpc"] {
            let stream = &row[api];
            assert_eq!(stream["lost_tokens"], 0, "{row}");
            assert!(stream["fault"].is_null(), "{row}");
            // A token takes 5 ms, so a shorter longest gap means that nothing was measured.
            assert!(stream["longest_gap_ms"].as_f64() >= Some(4.0), "{row}");
        }
        let memory = |name: &str| row["memory"][name].as_u64().expect("a number");
        // The server may return memory in between, so its peak can be below what it had before.
        for at in ["idle", "peak", "after"] {
            assert!(memory(at) > 0, "{row}");
        }
        assert!(row["server_cores"].as_f64() > Some(0.0), "{row}");
    }
    assert_eq!(rows.len(), 2);
    let frames = rows[1]["outcome"]["ends"]["frames"].as_u64();
    assert!(frames > Some(0), "{}", rows[1]);
}

#[test]
fn a_missed_target_is_named_and_fails_the_check() {
    // No server ends a client that is slow for only a second.
    let arguments = "attack --check --seconds 1 --only drips";
    let ran = run(perf_command(split_words(arguments)));
    assert_eq!(ran.code, Some(2), "{ran}");
    assert!(ran.out.contains("MISSED drips: "), "{ran}");
    assert!(ran.out.contains(" clients not ended\n"), "{ran}");
}
