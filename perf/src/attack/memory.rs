//! The memory of the server before, during and after an attack.

use std::fs;

use anyhow::Context;
use procfs::process::Process;
use serde::Serialize;

use crate::process::rss_bytes;

/// Resident memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Memory {
    #[serde(skip)]
    process: u32,
    pub(super) idle: u64,
    /// Highest memory since [`Self::start`]. The kernel records it, so no peak is missed.
    pub(super) peak: u64,
    pub(super) after: u64,
}

impl Memory {
    /// Records the memory of the idle process, and forgets earlier peaks.
    pub(super) fn start(process: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{process}/clear_refs");
        // 5 resets VmHWM (proc_pid_clear_refs(5)).
        fs::write(&path, "5").context(path)?;
        let idle = rss_bytes(process)?;
        Ok(Self {
            process,
            idle,
            ..Self::default()
        })
    }

    pub(super) fn record_end(&mut self) -> anyhow::Result<()> {
        let process = Process::new(self.process.try_into()?)?;
        let peak = process.status()?.vmhwm.unwrap_or(0);
        self.peak = peak * 1024;
        self.after = rss_bytes(self.process)?;
        Ok(())
    }
}
