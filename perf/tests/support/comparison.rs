//! Runs `tokenway-perf compare`.

use std::fmt;

use serde_json::Value;

use super::{RunOutput, perf_command, read_json, run};

/// Output and JSON file of a run of `tokenway-perf compare`.
pub(crate) struct Comparison {
    pub(crate) ran: RunOutput,
    /// Contents of the file that `--json` wrote. Null if there is no file.
    pub(crate) json: Value,
}

/// Runs `compare`. Unless the arguments say otherwise, there is one round with one stream of four tokens.
pub(crate) fn compare(arguments: &[&str]) -> Comparison {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("comparison.json");
    let mut command = perf_command(["compare"]);
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
    /// Returns the recorded values of a time of the first server, in ascending order.
    pub(crate) fn time_values(&self, time: &str) -> Vec<u64> {
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

    /// Returns a number from the first round of the first server.
    pub(crate) fn round_number(&self, name: &str) -> u64 {
        let number = &self.json["servers"][0]["rounds"][0][name];
        number
            .as_u64()
            .unwrap_or_else(|| panic!("no {name}: {self}"))
    }

    pub(crate) fn assert_complete(&self) {
        self.ran.assert_succeeded();
    }

    /// Asserts that the run failed with a single line on standard error, which ends with this reason.
    pub(crate) fn assert_failed(&self, reason: &str) {
        let RunOutput { code, err, .. } = &self.ran;
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
