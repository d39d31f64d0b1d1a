//! Running `tokenway-perf compare`, and what it printed and wrote.

#![allow(
    dead_code,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::fs;
use std::process::Command;

use serde_json::Value;

/// What the program did.
pub(crate) struct Comparison {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
    /// What it wrote with `--json`; null where it wrote nothing.
    pub(crate) json: Value,
}

/// One round of one stream of four tokens, unless the arguments say otherwise.
pub(crate) fn compare(arguments: &[&str]) -> Comparison {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("comparison.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"));
    command.arg("compare");
    for (flag, value) in [("--streams", "1"), ("--tokens", "4"), ("--rounds", "1")] {
        if !arguments.contains(&flag) {
            command.args([flag, value]);
        }
    }
    let output = command.args(arguments).arg("--json").arg(&json).output();
    let output = output.expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("it prints text");
    let written = fs::read_to_string(json).unwrap_or_else(|_| "null".to_owned());
    Comparison {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
        json: serde_json::from_str(&written).expect("JSON"),
    }
}

impl Comparison {
    /// The values of a time over the first server's tokens, each as often as it occurred, the least
    /// first.
    pub(crate) fn values(&self, time: &str) -> Vec<u64> {
        let pairs = self.json["servers"][0]["histograms"][time].as_array();
        let pairs = pairs.unwrap_or_else(|| panic!("no {time}: {self}")).iter();
        let numbers = pairs.map(|pair| (pair[0].as_u64(), pair[1].as_u64()));
        numbers
            .flat_map(|(value, count)| {
                let count = count.expect("how often").try_into().expect("not so many");
                std::iter::repeat_n(value.expect("a value"), count)
            })
            .collect()
    }

    /// A number of the first server's first round.
    pub(crate) fn number(&self, name: &str) -> u64 {
        let number = &self.json["servers"][0]["rounds"][0][name];
        number
            .as_u64()
            .unwrap_or_else(|| panic!("no {name}: {self}"))
    }

    /// All streams were whole.
    pub(crate) fn assert_whole(&self) {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self}");
    }

    /// It failed, and said why in one line.
    pub(crate) fn assert_failed(&self, reason: &str) {
        assert_eq!(self.code, Some(1), "{self}");
        assert_eq!(self.err.lines().count(), 1, "{self}");
        assert!(self.err.starts_with("error: "), "{self}");
        assert!(
            self.err.ends_with(&format!(", round 1: {reason}\n")),
            "{self}"
        );
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}\n{}\n{}", self.code, self.out, self.err)
    }
}
