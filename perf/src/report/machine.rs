//! Describes the machine and the commit of a run.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use procfs::{CpuInfo, Current};
use serde::Serialize;

/// Machine, commit and load average of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// Commit of the working directory, followed by `+` if tracked files have changes.
    pub(crate) commit: String,
    /// Start of the run, in seconds since the Unix epoch.
    began: u64,
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) kernel: String,
    /// Load average over one minute, before the first round.
    pub(crate) load_before: String,
    /// Load average over one minute, after the last round.
    pub(crate) load_after: String,
    /// Build profile. The figures of a `debug` build are meaningless.
    pub(crate) build: &'static str,
}

impl Machine {
    /// Captures the machine and the commit at the start of a run.
    pub(crate) fn capture() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            commit: read_commit(),
            began: since_epoch.unwrap_or_default().as_secs(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            processor: read_processor_name(),
            kernel: read_first_word("/proc/sys/kernel/osrelease"),
            load_before: read_load_average(),
            load_after: String::new(),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        }
    }

    pub(crate) fn record_end(&mut self) {
        self.load_after = read_load_average();
    }
}

fn read_load_average() -> String {
    read_first_word("/proc/loadavg")
}

fn read_first_word(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let word = text.split_whitespace().next();
    word.unwrap_or_default().to_owned()
}

fn read_processor_name() -> String {
    let processors = CpuInfo::current().ok();
    let name = processors.as_ref().and_then(|all| all.model_name(0));
    name.unwrap_or("unknown").to_owned()
}

fn read_commit() -> String {
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
