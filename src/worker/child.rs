//! A worker in a process of its own, which the engine starts, watches and starts again.
//!
//! The process dials in like any other worker. What is particular to it is that its end is known, and how it
//! ended; that one whose stream has ended is made to end; and that none outlives the engine.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use std::os::unix::process::ExitStatusExt;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::attached::{AttachService, ChildState, Ended, Exit};
use super::{WorkerEvent, WorkerId};

/// By what a child is told what it is to show when it dials in.
pub const TOKEN_VARIABLE: &str = "TOKENWAY_CHILD_TOKEN";

/// By what a child is told who has started it: it ends with that process.
pub const PARENT_VARIABLE: &str = "TOKENWAY_CHILD_PARENT";

/// How long a child is waited for before it is started again; doubled each time that it did not get ready, up to
/// the last.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(10);

/// A child that so many times in a row did not get ready is not started again.
const GIVE_UP: u32 = 10;

/// How long a child may take to end that has nothing more to do.
const LAST_STEP: Duration = Duration::from_secs(2);

/// The signals by which somebody ends a process from outside.
const FROM_OUTSIDE: [i32; 4] = [1, 2, 9, 15];

/// The longest line of a child's log that is forwarded whole, in bytes.
const LINE: usize = 4 * 1024;

/// What is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// Its arguments, which do not say yet where the engine is.
    pub arguments: Vec<OsString>,
}

/// One child's place in its engine.
pub(crate) struct ChildSpec {
    pub(crate) worker: WorkerId,
    /// Its model's place in the catalog, and the model's name.
    pub(crate) model: (usize, String),
    /// Which device it is for, from 0.
    pub(crate) device: usize,
    /// Where the engine's worker socket is.
    pub(crate) engine: String,
}

/// Keeps a child running until `stopping` is cancelled, or it is given up.
pub(crate) async fn supervise(
    program: Program,
    place: ChildSpec,
    door: AttachService,
    events: mpsc::Sender<WorkerEvent>,
    stopping: CancellationToken,
) {
    let (worker, model) = (place.worker, place.model.1.clone());
    let mut back_off = BACK_OFF;
    let mut in_vain = 0;
    loop {
        let life = live(&program, &place, &door, &stopping).await;
        if stopping.is_cancelled() {
            return;
        }
        let ended = match life {
            Life::WasReady => {
                back_off = BACK_OFF;
                in_vain = 0;
                None
            }
            Life::NeverReady(ended) => {
                in_vain += 1;
                Some(ended)
            }
        };
        if let Some(Ended {
            reason, was_killed, ..
        }) = ended
        {
            if in_vain >= GIVE_UP {
                let reason = format!("{reason}; it was started {GIVE_UP} times in vain");
                // Nobody listens any more once the engine has ended.
                let _ = events.send(WorkerEvent::GivenUp(worker, reason)).await;
                return;
            }
            if was_killed {
                // That says nothing of its model.
                tracing::warn!(
                    worker = worker.0,
                    model,
                    reason,
                    "a worker was killed while it loaded"
                );
            } else {
                let _ = events.send(WorkerEvent::LoadFailed(worker, reason)).await;
            }
        }
        if stopping
            .run_until_cancelled(sleep(back_off))
            .await
            .is_none()
        {
            return;
        }
        if in_vain > 0 {
            back_off = (back_off * 2).min(BACK_OFF_LIMIT);
        }
    }
}

/// How a child's life ended.
enum Life {
    /// Its model was loaded. Who was on it has been told.
    WasReady,
    /// It was not, for this reason.
    NeverReady(Ended),
}

async fn live(
    program: &Program,
    place: &ChildSpec,
    door: &AttachService,
    stopping: &CancellationToken,
) -> Life {
    let token = uuid::Uuid::new_v4().simple().to_string();
    let (exited, exit) = watch::channel(None);
    let watch = door.expect(place.model.0, place.worker, token.clone(), exit);
    let life = match start(program, place, &token) {
        Ok(child) => {
            let exit = watch_over(child, place, (&watch, &exited), stopping).await;
            if watch.was_ready() {
                Life::WasReady
            } else {
                Life::NeverReady(exit)
            }
        }
        Err(error) => {
            let path = program.path.display();
            Life::NeverReady(Ended {
                kind: Exit::Ended,
                was_killed: false,
                reason: format!("{path} cannot be started: {error}"),
            })
        }
    };
    door.forget(place.model.0, &token);
    life
}

fn start(program: &Program, place: &ChildSpec, token: &str) -> std::io::Result<Child> {
    let mut command = Command::new(&program.path);
    // What it is to do its arguments say. The engine's own settings are none of a worker's.
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(name)) {
        command.env_remove(name);
    }
    command
        .args(&program.arguments)
        .arg("--engine")
        .arg(&place.engine)
        .arg("--device")
        .arg(place.device.to_string())
        .arg("--name")
        .arg(name(place))
        .env(TOKEN_VARIABLE, token)
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal goes to a whole group: it is the engine's to say when its workers end.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Whether an environment variable is a setting of a server's; how much is logged holds for its workers, too.
fn is_setting(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let begins = ["TOKENWAY_", "TEST_RUNNER_", "MODEL_RUNNER"];
    name != "TOKENWAY_LOG" && begins.iter().any(|begin| name.starts_with(begin))
}

fn name(place: &ChildSpec) -> String {
    format!("worker-{}", place.worker.0)
}

/// Waits for a child's end, and makes it end when it is of no use any more.
async fn watch_over(
    mut child: Child,
    place: &ChildSpec,
    (watch, exited): (&ChildState, &watch::Sender<Option<Ended>>),
    stopping: &CancellationToken,
) -> Ended {
    let log = child.stderr.take();
    let name = name(place);
    let mut forwarding = pin!(async {
        if let Some(log) = log {
            forward(log, &name).await;
        }
    });
    let mut has_said_all = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break Some(status),
            () = watch.detached() => break None,
            // It was told to end by its stream.
            () = stopping.cancelled() => break timeout(LAST_STEP, child.wait()).await.ok(),
            () = &mut forwarding, if !has_said_all => has_said_all = true,
        }
    };
    let status = match status {
        Some(status) => status,
        None => match timeout(super::attached::CHILD_EXIT_TIMEOUT, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                // It has ended already where it cannot be killed.
                let _ = child.start_kill();
                child.wait().await
            }
        },
    };
    let ended = ended(status);
    // Whoever waits to know how it ended knows it before its last words are read.
    exited.send_replace(Some(ended.clone()));
    if !has_said_all {
        let _ = timeout(super::attached::CHILD_EXIT_TIMEOUT, forwarding).await;
    }
    ended
}

fn ended(status: std::io::Result<ExitStatus>) -> Ended {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return Ended {
                kind: Exit::Ended,
                was_killed: false,
                reason: format!("its process is lost: {error}"),
            };
        }
    };
    let kind = match (status.code(), status.signal()) {
        // 101 is a panic's.
        (Some(101), _) => Exit::Crashed,
        (Some(_), _) => Exit::Ended,
        (None, Some(signal)) if FROM_OUTSIDE.contains(&signal) => Exit::Ended,
        (None, _) => Exit::Crashed,
    };
    let was_killed = status.signal().is_some() && kind == Exit::Ended;
    Ended {
        kind,
        was_killed,
        reason: if was_killed {
            format!("its process was killed: {status}")
        } else {
            format!("its process ended: {status}; its log lines say why")
        },
    }
}

/// Passes a child's log on, line by line, with its name.
async fn forward(log: impl AsyncRead + Unpin, worker: &str) {
    let mut log = BufReader::with_capacity(LINE, log);
    let mut line = Vec::new();
    loop {
        let taken = match log.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(bytes) => {
                let end = memchr::memchr(b'\n', bytes);
                let taken = end.map_or(bytes.len(), |end| end + 1);
                line.extend_from_slice(&bytes[..taken]);
                taken
            }
        };
        log.consume(taken);
        // A line that does not end is passed on in pieces.
        if line.ends_with(b"\n") || line.len() >= LINE {
            tell(worker, &line);
            line.clear();
        }
    }
    tell(worker, &line);
}

fn tell(worker: &str, line: &[u8]) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    let (level, rest) = text.split_once(' ').unwrap_or((text, ""));
    let rest = rest.trim_start();
    // A worker's own lines begin with their level. Any other is a panic's, or the system's.
    match level {
        "ERROR" => tracing::error!(target: "tokenway::worker", worker, "{rest}"),
        "WARN" => tracing::warn!(target: "tokenway::worker", worker, "{rest}"),
        "INFO" => tracing::info!(target: "tokenway::worker", worker, "{rest}"),
        "DEBUG" => tracing::debug!(target: "tokenway::worker", worker, "{rest}"),
        "TRACE" => tracing::trace!(target: "tokenway::worker", worker, "{rest}"),
        "" => {}
        _ => tracing::warn!(target: "tokenway::worker", worker, "{text}"),
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::telemetry::Telemetry;
    use crate::worker::attached::{AttachableModel, WorkerTimeouts};

    #[tokio::test(start_paused = true)]
    async fn a_child_that_failed_to_start_ten_times_is_given_up() {
        let (events, mut told) = mpsc::channel(16);
        let offered = AttachableModel {
            name: "m".to_owned(),
            aliases: Vec::new(),
            slow_reader_timeout: Duration::from_secs(10),
        };
        let patience = WorkerTimeouts {
            heartbeat_timeout: Duration::from_secs(2),
            step_limit: None,
            tokenizer_call_timeout: Duration::from_secs(10),
        };
        let door = AttachService::new(
            vec![offered],
            1,
            patience,
            events.clone(),
            (Telemetry::new(), TaskTracker::new()),
        );
        let program = Program {
            path: "/there/is/no/such/program".into(),
            arguments: Vec::new(),
        };
        let place = ChildSpec {
            worker: WorkerId(0),
            model: (0, "m".into()),
            device: 0,
            engine: "unix:/there/is/no/such/socket".to_owned(),
        };
        supervise(program, place, door, events, CancellationToken::new()).await;
        for _ in 1..GIVE_UP {
            assert!(matches!(
                told.recv().await,
                Some(WorkerEvent::LoadFailed(..))
            ));
        }
        let Some(WorkerEvent::GivenUp(_, reason)) = told.recv().await else {
            panic!("it is given up");
        };
        assert!(reason.contains("cannot be started"), "{reason}");
    }
}
