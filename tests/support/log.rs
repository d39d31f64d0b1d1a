//! Captured log lines: of this process, and of `tokenway` processes.

use std::io;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use serde_json::Value;
use tokenway::logging::{Timestamps, start_json};
use tracing_subscriber::EnvFilter;

/// The log of this process, at debug level. All tests of a process share it, so each test looks for its own request
/// ids.
pub static LOG: LazyLock<CapturedLog> = LazyLock::new(|| {
    let captured = CapturedLog::default();
    let writer = captured.clone();
    let filter = EnvFilter::new("tokenway=debug");
    start_json(filter, move || writer.clone(), Timestamps::On);
    captured
});

/// A log in memory.
#[derive(Clone, Default)]
pub struct CapturedLog(Arc<Mutex<Vec<u8>>>);

impl CapturedLog {
    /// Returns the lines of the access log about the request with this id.
    pub fn access_lines(&self, id: &str) -> Vec<Value> {
        let is_access = |line: &Value| line["target"] == "tokenway::access" && line["id"] == id;
        self.lines().into_iter().filter(is_access).collect()
    }

    /// All lines.
    pub fn lines(&self) -> Vec<Value> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parse_log(std::str::from_utf8(&bytes).expect("the log is UTF-8"))
    }
}

impl io::Write for CapturedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Parses a log in the JSON format.
pub fn parse_log(log: &str) -> Vec<Value> {
    let parsed = log.lines().map(|line| {
        let parsed: Value = serde_json::from_str(line).unwrap_or_else(|error| {
            panic!("a line of the log is not JSON: {error}: {line}");
        });
        assert!(
            parsed["level"].is_string() && parsed["target"].is_string(),
            "{line}"
        );
        parsed
    });
    parsed.collect()
}
