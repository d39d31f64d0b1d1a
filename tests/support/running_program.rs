//! Child processes of the tests. A child process is killed when the test drops it.

use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open, waitpid,
};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout};

/// A running child process. It is killed when it is dropped.
pub struct RunningProgram {
    child: Child,
    /// Standard output of the process, while the test reads it.
    lines: Option<Lines<BufReader<ChildStdout>>>,
    /// Standard error of the process, if the test reads it.
    log: Option<Lines<BufReader<ChildStderr>>>,
}

impl RunningProgram {
    /// Wraps a process that has just been started. The test can read what is piped of its output.
    pub(super) fn new(mut child: Child) -> Self {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Self {
            child,
            lines: stdout.map(|stdout| BufReader::new(stdout).lines()),
            log: stderr.map(|stderr| BufReader::new(stderr).lines()),
        }
    }

    /// Returns the next line of standard output.
    pub async fn read_line(&mut self) -> String {
        let lines = self.lines.as_mut().expect("the output is readable");
        let line = lines.next_line().await;
        line.expect("the output is UTF-8")
            .expect("the program prints a line")
    }

    /// Closes the reading end of standard output.
    pub fn close_output(&mut self) {
        self.lines = None;
    }

    /// Closes the reading end of standard error.
    pub fn close_log(&mut self) {
        self.log = None;
    }

    /// Waits for a log line that contains `text`.
    pub async fn wait_for_log(&mut self, text: &str) {
        let log = self.log.as_mut().expect("the log is readable");
        loop {
            let line = log.next_line().await.expect("the log is UTF-8");
            if line.expect("the process is running").contains(text) {
                return;
            }
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.id(), signal).expect("the process is running");
    }

    /// Sends a signal to the process group that the process leads. The group may already have exited.
    pub fn signal_group(&self, signal: Signal) {
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            let id = Pid::from_raw(id).expect("a process has an id");
            let _ = kill_process_group(id, signal);
        }
    }

    /// Suspends the process with SIGSTOP, and waits until it has stopped.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let stopped =
            waitpid(Some(self.id()), WaitOptions::UNTRACED).expect("the process is a child");
        assert!(stopped.is_some_and(|(_, status)| status.stopped()));
    }

    /// Returns the running child processes of this process.
    pub fn children(&self) -> Vec<Pid> {
        let tasks = format!("/proc/{}/task", self.id().as_raw_nonzero());
        let tasks = std::fs::read_dir(tasks).expect("the process is running");
        let mut children = Vec::new();
        for task in tasks {
            let path = task.expect("a directory entry").path().join("children");
            // The thread may have exited in the meantime.
            let listed = std::fs::read_to_string(path).unwrap_or_default();
            let ids = listed.split_whitespace().filter_map(|id| id.parse().ok());
            children.extend(ids.filter_map(Pid::from_raw));
        }
        children.sort_by_key(|id| id.as_raw_nonzero());
        children
    }

    /// Sends a signal to a child of this process. The child may already have exited.
    pub fn signal_child(&self, child: Pid, signal: Signal) {
        let _ = kill_process(child, signal);
    }

    fn id(&self) -> Pid {
        let id = self.child.id().expect("the process is running");
        let id = i32::try_from(id).ok().and_then(Pid::from_raw);
        id.expect("a process has an id")
    }

    /// Waits until the process exits. Returns its exit code, or `None` if a signal ended it.
    pub async fn wait_for_exit_code(self) -> Option<i32> {
        self.wait_for_exit().await.code()
    }

    /// Waits until the process exits.
    pub async fn wait_for_exit(mut self) -> ExitStatus {
        self.child.wait().await.expect("the process exits")
    }

    /// Sends SIGINT, as Ctrl-C does, and waits until the process exits. Returns its exit code.
    pub async fn interrupt(self) -> Option<i32> {
        self.signal(Signal::INT);
        self.wait_for_exit_code().await
    }
}

/// Waits until the process has exited.
pub async fn wait_until_gone(process: Pid) {
    // Opening fails if the process has already exited.
    if let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) {
        let ended = tokio::task::spawn_blocking(move || {
            poll(&mut [PollFd::new(&handle, PollFlags::IN)], None)
        });
        let ended = ended.await.expect("the task does not panic");
        assert_eq!(ended, Ok(1));
    }
}
