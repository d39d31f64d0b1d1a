//! The limit of open files of a process. Each socket is an open file.

use anyhow::{Context, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit, so that this process and its future child processes can each open this many files.
pub(crate) fn raise_limit(files: u32) -> anyhow::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = u64::from(files);
    // `None` is unlimited.
    if current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    let hard = maximum.unwrap_or(needed);
    ensure!(
        hard >= needed,
        "this run needs {needed} open files in one process, and the hard limit RLIMIT_NOFILE allows {hard} \
         (`ulimit -Hn`): raise it, or leave out the loads of thousands of streams"
    );
    let current = Some(hard);
    setrlimit(Resource::Nofile, Rlimit { current, maximum })
        .context("cannot raise the limit RLIMIT_NOFILE of open files")
}
