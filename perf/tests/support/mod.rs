//! Runs `tokenway-perf`, its own server, and servers with planted faults.

#![allow(
    dead_code,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

pub(crate) mod comparison;
pub(crate) mod grpc;
pub(crate) mod planted;

/// Indices sent in the place of 0, 1, 2, 3, and the fault that must be reported.
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
        "token_4 is extra: it arrived at place 4, and 4 were requested",
    ),
];

/// Result of a run of the program.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn assert_succeeded(&self) {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self}");
    }

    /// Asserts that the run failed with this one line on standard error.
    pub(crate) fn assert_failed(&self, reason: &str) {
        assert_eq!(self.code, Some(1), "{self}");
        assert_eq!(self.err, format!("error: {reason}\n"), "{self}");
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}\n{}\n{}", self.code, self.out, self.err)
    }
}

/// The program with these arguments, without the environment variables that it reads.
pub(crate) fn program(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
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

/// Runs a command to its end.
pub(crate) fn run(mut command: Command) -> Ran {
    let output = command.output().expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("the program prints text");
    Ran {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// Arguments in one text, separated by spaces.
pub(crate) fn words(arguments: &str) -> impl Iterator<Item = &str> {
    arguments.split_whitespace()
}

/// A path as an argument.
pub(crate) fn text_of(path: &Path) -> &str {
    path.to_str().expect("the path is ASCII")
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).expect("the file was written");
    serde_json::from_str(&text).expect("the file is JSON")
}

/// Asserts that a page loads nothing from other places.
pub(crate) fn assert_self_contained(page: &str) {
    for reference in ["src=", "href=", "@import", "url("] {
        assert!(!page.contains(reference), "the page has {reference}");
    }
}

/// The program's own server in a process of its own, which ends when this is dropped.
pub(crate) struct ServerProcess {
    child: Child,
    pub(crate) http: String,
    pub(crate) grpc: String,
}

impl ServerProcess {
    /// Starts the product on the test runner, with four slots.
    pub(crate) fn start(interval_ms: u32) -> Self {
        let options = json!({
            "role": "product", "slots": 4, "queue": 4, "grpc_listen": "127.0.0.1:0",
            "interval": {"secs": 0, "nanos": interval_ms * 1_000_000},
            "peer_timeout": {"secs": 10, "nanos": 0},
        });
        let mut command = program(["serve", &options.to_string()]);
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
