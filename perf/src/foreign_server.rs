//! A server in its own process, such as another gateway. Its output goes to a log, whose last lines an error shows.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempfile;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout_at};

use crate::fault::Fault;
use crate::process::{ResourceUsage, child_ids};

/// Time between two checks of whether a started server answers.
const START_POLL: Duration = Duration::from_millis(100);
/// Number of lines from the end of the log that an error shows.
const LOG_LINES: usize = 8;

/// A server in its own process. Dropping this kills the process and its descendants.
pub(crate) struct ForeignServer {
    /// Path of the program, for errors.
    program: String,
    child: Child,
    log: File,
}

impl ForeignServer {
    /// Starts the server, and waits until `answers` returns true. `answers` returns false while the server is starting,
    /// and an error if the server will never answer correctly.
    ///
    /// # Errors
    /// The program cannot be run, its process ends, or it does not answer within `timeout`.
    pub(crate) async fn start(
        command: Command,
        timeout: Duration,
        mut answers: impl AsyncFnMut() -> Result<bool, Fault>,
    ) -> anyhow::Result<Self> {
        let mut server = Self::spawn(command)?;
        let end = Instant::now() + timeout;
        loop {
            let answer = timeout_at(end, answers()).await;
            let answer = answer.unwrap_or(Ok(false));
            if let Ok(true) = answer {
                return Ok(server);
            }
            // If the process has ended, its log explains more than the failed request.
            if let Some(status) = server.child.try_wait()? {
                bail!(
                    "{} ended with {status}{}",
                    server.program,
                    server.end_of_log()?
                );
            }
            if let Err(fault) = answer {
                bail!(
                    "{} did not complete its first request: {fault}{}",
                    server.program,
                    server.end_of_log()?
                );
            }
            ensure!(
                Instant::now() < end,
                "{} does not answer within {timeout:?}{}",
                server.program,
                server.end_of_log()?
            );
            sleep(START_POLL).await;
        }
    }

    fn spawn(mut command: Command) -> anyhow::Result<Self> {
        let program = command.as_std().get_program().display().to_string();
        let log = tempfile()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        Ok(Self {
            program,
            child,
            log,
        })
    }

    /// Returns the usage of the server's process and its descendants so far.
    pub(crate) fn usage(&self) -> anyhow::Result<ResourceUsage> {
        let id = self.child.id();
        let id = id.with_context(|| format!("{} has ended", self.program))?;
        Ok(ResourceUsage::of_process(id)?)
    }

    /// Kills the server's processes and waits for the end of the first one, so that they take no CPU time from the next
    /// server.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.kill_descendants();
        Ok(self.child.kill().await?)
    }

    /// Kills the processes that the server has started. vLLM, for example, computes in a child process.
    fn kill_descendants(&self) {
        for id in self.child.id().map(descendants).unwrap_or_default() {
            // The signal fails if the process has ended in the meantime, which is fine.
            if let Some(id) = i32::try_from(id).ok().and_then(Pid::from_raw) {
                let _ = kill_process(id, Signal::KILL);
            }
        }
    }

    /// Returns the last lines of the log, as the end of an error.
    fn end_of_log(&self) -> anyhow::Result<String> {
        let (mut log, mut bytes) = (&self.log, Vec::new());
        log.rewind()?;
        log.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
        Ok(if last.is_empty() {
            ", and its log is empty".to_owned()
        } else {
            format!(":\n{}", last.join("\n"))
        })
    }
}

impl Drop for ForeignServer {
    fn drop(&mut self) {
        self.kill_descendants();
    }
}

/// Returns the ids of all descendants of a process.
fn descendants(id: u32) -> Vec<u32> {
    let children = child_ids(id).unwrap_or_default();
    let later: Vec<_> = children.iter().copied().flat_map(descendants).collect();
    children.into_iter().chain(later).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn script(script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", script]);
        command
    }

    /// Starts a server that never answers. Returns the error.
    async fn fail(
        command: Command,
        limit: Duration,
        answer: fn() -> Result<bool, Fault>,
    ) -> String {
        let started = ForeignServer::start(command, limit, async || answer()).await;
        let error = started.err().expect("the server does not answer");
        format!("{error:#}")
    }

    #[tokio::test]
    async fn a_server_that_ends_is_reported_with_the_last_lines_of_its_output() {
        let ends =
            script("for line in {1..10}; do echo $line; done; exec >&2; echo no model; exit 3");
        let reason = "bash ended with exit status: 3:\n4\n5\n6\n7\n8\n9\n10\nno model";
        assert_eq!(fail(ends, LIMIT, || Ok(false)).await, reason);
        let reason = "bash ended with exit status: 1, and its log is empty";
        assert_eq!(fail(script("exit 1"), LIMIT, || Ok(false)).await, reason);
        let reason = fail(Command::new("/no/server"), LIMIT, || Ok(false)).await;
        assert!(reason.starts_with("cannot run /no/server: "), "{reason}");
    }

    #[tokio::test]
    async fn a_server_that_answers_wrongly_or_too_late_is_not_waited_for() {
        let waits = || script("exec sleep 600");
        let wrong = fail(waits(), LIMIT, || Err(Fault::TooMany(1))).await;
        let reason = "bash did not complete its first request: more than the requested 1 tokens";
        assert!(wrong.starts_with(reason), "{wrong}");
        let late = fail(waits(), Duration::ZERO, || Ok(false)).await;
        assert!(
            late.starts_with("bash does not answer within 0ns"),
            "{late}"
        );
    }

    #[tokio::test]
    async fn the_processes_that_a_server_has_started_end_with_it() {
        for is_stopped in [true, false] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            // The connection stays open as long as the grandchild lives.
            let grandchild = format!(
                "(bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; exec sleep 600'; true) & wait"
            );
            let mut connection = None;
            let server = ForeignServer::start(script(&grandchild), LIMIT, async || {
                connection = Some(listener.accept().await?.0);
                Ok(true)
            });
            let server = server.await.unwrap();
            assert!(server.usage().unwrap().rss_bytes > 0);
            if is_stopped {
                server.stop().await.unwrap();
            } else {
                drop(server);
            }
            let mut connection = connection.expect("the grandchild has connected");
            let end = timeout(LIMIT, connection.read(&mut [0])).await;
            assert_eq!(
                end.expect("the grandchild ends").unwrap(),
                0,
                "{is_stopped}"
            );
        }
    }
}
