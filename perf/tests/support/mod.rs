//! Helpers that run `tokenway-perf`, its own server, and servers with planted faults.

#![allow(
    dead_code,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

pub(crate) mod comparison;
pub(crate) mod grpc;
pub(crate) mod planted;

/// Token indices that a server sends instead of 0, 1, 2, 3, each with the fault that must be reported.
pub(crate) const WRONG_ORDERS: [(&[u32], &str); 5] = [
    (&[0, 1, 3], "token_2 is lost: token_3 arrived in its place"),
    (&[0, 1, 2], "token_3 is lost: 3 of 4 tokens arrived"),
    (
        &[0, 1, 1, 2, 3],
        "token_1 is repeated: it arrived again in the place of token_2",
    ),
    (
        &[0, 2, 1, 3],
        "token_2 and token_1 are swapped: token_2 arrived first",
    ),
    (
        &[0, 1, 2, 3, 4],
        "token_4 is unexpected: only 4 tokens were requested (it arrived in the place of token_4)",
    ),
];

/// Exit code and output of a run of `tokenway-perf`.
pub(crate) struct RunOutput {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl RunOutput {
    pub(crate) fn assert_succeeded(&self) {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self}");
    }

    pub(crate) fn assert_failed(&self, reason: &str) {
        assert_eq!(self.code, Some(1), "{self}");
        assert_eq!(self.err, format!("error: {reason}\n"), "{self}");
    }
}

impl fmt::Display for RunOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}\n{}\n{}", self.code, self.out, self.err)
    }
}

/// Returns the command `tokenway-perf` with these arguments. The environment variables that it reads are unset.
pub(crate) fn perf_command(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"));
    command.args(arguments).stdin(Stdio::null());
    for variable in [
        "TEST_RUNNER_FREQUENCY_MS",
        "TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS",
        "SERVER_BASE_URL",
    ] {
        command.env_remove(variable);
    }
    command
}

pub(crate) fn run(mut command: Command) -> RunOutput {
    let output = command.output().expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("the program prints text");
    RunOutput {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

pub(crate) fn split_words(arguments: &str) -> impl Iterator<Item = &str> {
    arguments.split_whitespace()
}

pub(crate) fn path_text(path: &Path) -> &str {
    path.to_str().expect("the path is ASCII")
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).expect("the file was written");
    serde_json::from_str(&text).expect("the file is JSON")
}

/// Writes a script for the shell, as a program.
pub(crate) fn write_program(path: &str, script: &str) {
    fs::write(path, format!("#!/bin/sh\n{script}")).expect("a file");
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("the test owns the file");
}

/// Asserts that an HTML page loads no other file.
pub(crate) fn assert_self_contained(page: &str) {
    for reference in ["src=", "href=", "@import", "url("] {
        assert!(!page.contains(reference), "the page has {reference}");
    }
}

/// A server that `tokenway-perf serve` runs in its own process. The process ends when this is dropped.
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) http: String,
    pub(crate) grpc: String,
}

impl ServerProcess {
    /// Starts Tokenway with the test runner and four slots.
    pub(crate) fn start(interval_ms: u32) -> Self {
        let options = json!({
            "role": "product", "slots": 4, "queue": 4, "grpc_listen": "127.0.0.1:0",
            "interval": {"secs": 0, "nanos": interval_ms * 1_000_000},
            "peer_timeout": {"secs": 10, "nanos": 0},
        });
        let mut command = perf_command(["serve", &options.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        let mut addresses = String::new();
        let stdout = child.stdout.take().expect("its output is piped");
        let read = BufReader::new(stdout).read_line(&mut addresses);
        read.expect("text");
        let address = |label| {
            let mut addresses = addresses.split_whitespace();
            let address = addresses.find_map(|address| address.strip_prefix(label));
            address.expect("the server prints its addresses").to_owned()
        };
        Self {
            http: address("http="),
            grpc: address("grpc="),
            child,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.http)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
