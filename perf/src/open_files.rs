//! The limit of open files of a process, of which each socket is one.

use anyhow::{Context, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Allows this process, and each that it starts from now on, to open this many files.
pub(crate) fn allow(files: u32) -> anyhow::Result<()> {
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
