//! Priorities of the processes. Attackers usually run on other machines, so here the server and the bystanders take
//! precedence over them.

use std::io;

use rustix::process::{getpriority_process, setpriority_process};

/// Nice value of the server and the bystanders, for users who may raise priorities.
const RAISED: i32 = -15;
/// Difference between the nice values of the attackers and of the server.
const STEP: i32 = 15;
/// Highest nice value, which is the lowest priority.
const LOWEST: i32 = 19;

/// Raises the priority of this thread, and of the threads and processes that it starts later, if the user may do that.
pub(super) fn raise() {
    let _ = setpriority_process(None, RAISED);
}

/// Lowers the priority of the attackers' process below that of the process that has started it.
pub(super) fn lower() -> io::Result<()> {
    let nice = getpriority_process(None)?;
    Ok(setpriority_process(None, LOWEST.min(nice + STEP))?)
}
