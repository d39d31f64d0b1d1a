//! What a report says of where and when it was made.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The stamp of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// The commit in the folder where the run was started, with `+` where files differ from it.
    pub(crate) commit: String,
    /// When the run began, in seconds since the Unix epoch.
    pub(crate) began: u64,
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    /// The load average over one minute before the first round.
    pub(crate) load_before: String,
    /// The same after the last round.
    pub(crate) load_after: String,
    /// `release`, or `debug`, whose figures mean nothing.
    pub(crate) build: &'static str,
}

impl Machine {
    /// The stamp of a run that begins now.
    pub(crate) fn now() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            commit: commit(),
            began: since_epoch.unwrap_or_default().as_secs(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            processor: processor(),
            kernel: first_words("/proc/sys/kernel/osrelease", 1),
            load_before: load(),
            load_after: String::new(),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        }
    }

    /// The run has ended now.
    pub(crate) fn ended(&mut self) {
        self.load_after = load();
    }
}

fn load() -> String {
    first_words("/proc/loadavg", 1)
}

fn first_words(path: &str, words: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let words: Vec<_> = text.split_whitespace().take(words).collect();
    words.join(" ")
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':'));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => commit,
        Some(_) | None => format!("{commit}+"),
    }
}
