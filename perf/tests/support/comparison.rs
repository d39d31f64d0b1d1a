//! Runs `tokenway-perf compare`.

use std::fmt;

use serde_json::Value;

use super::{Ran, program, read_json, run};

/// Result of `tokenway-perf compare`.
pub(crate) struct Comparison {
    pub(crate) ran: Ran,
    /// File that was written with `--json`; null if there is none.
    pub(crate) json: Value,
}

/// Compares with one round of one stream of four tokens, unless the arguments differ.
pub(crate) fn compare(arguments: &[&str]) -> Comparison {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("comparison.json");
    let mut command = program(["compare"]);
    for (flag, value) in [("--streams", "1"), ("--tokens", "4"), ("--rounds", "1")] {
        if !arguments.contains(&flag) {
            command.args([flag, value]);
        }
    }
    command.args(arguments).arg("--json").arg(&json);
    Comparison {
        ran: run(command),
        json: if json.exists() {
            read_json(&json)
        } else {
            Value::Null
        },
    }
}

impl Comparison {
    /// Values of a time over the first server's tokens, in ascending order.
    pub(crate) fn values(&self, time: &str) -> Vec<u64> {
        let pairs = self.json["servers"][0]["histograms"][time].as_array();
        let pairs = pairs.unwrap_or_else(|| panic!("no {time}: {self}")).iter();
        let numbers = pairs.map(|pair| (pair[0].as_u64(), pair[1].as_u64()));
        numbers
            .flat_map(|(value, count)| {
                let count = count.expect("a count").try_into().expect("a small count");
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

    /// Asserts that all streams were complete.
    pub(crate) fn assert_whole(&self) {
        self.ran.assert_succeeded();
    }

    /// Asserts that the run failed with one line, which ends with this reason.
    pub(crate) fn assert_failed(&self, reason: &str) {
        let Ran { code, err, .. } = &self.ran;
        assert_eq!((*code, err.lines().count()), (Some(1), 1), "{self}");
        assert!(err.starts_with("error: "), "{self}");
        assert!(err.ends_with(&format!(", round 1: {reason}\n")), "{self}");
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ran.fmt(f)
    }
}
